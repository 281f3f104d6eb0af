// One block of threads: what its threads call, and what runs it.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace emulator {

struct Dim {
    unsigned x = 1, y = 1, z = 1;
};

/// The largest dynamic shared memory of a block, in bytes: compute capability 9.0.
constexpr unsigned MAX_SHARED = 227 << 10;
constexpr int WARP = 32;

/// A kernel did what a device would hang on, or leave undefined.
struct Fault : std::runtime_error {
    using std::runtime_error::runtime_error;
};

/// A barrier or warp intrinsic in the source. Two threads are at the same one if their sites are equal.
struct Site {
    const char* name;
    const char* file;
    int line;
};

/// Where the running thread is.
struct Position {
    Dim thread, block, threads, blocks;
};
extern thread_local const Position* position;

/// Bytes of dynamic shared memory of the running block, aligned to 16, of undefined (poisoned) content.
unsigned char* dynamic_shared();

/// Waits for all threads of the block that have not returned. The sum of their `predicate`s, and how
/// many they are.
struct Count {
    int votes, voters;
};
Count block_barrier(Site site, bool predicate);

/// Waits for the lanes of `mask`; the bits of those whose `predicate` holds.
unsigned warp_vote(Site site, unsigned mask, bool predicate);
/// Waits for the lanes of `mask`; the `value` of lane `source`.
std::uint64_t warp_exchange(Site site, unsigned mask, std::uint64_t value, int source);
/// The running thread's place in its warp.
int lane();

/// Stops the launch, as `__trap` does.
[[noreturn]] void trap(Site site);

/// Runs `call(parameters)` in every thread of every block. In reverse order of threads and blocks if
/// `reverse`: a kernel that lacks a barrier is seldom right in both.
/// Throws `Fault`.
void run(void (*call)(void**), void** parameters, Dim blocks, Dim threads, unsigned shared, bool reverse);

}  // namespace emulator
