// Runs the threads of a block as fibers: each until it waits, then what waits is let go together.
#include "block.h"

#ifdef __x86_64__
#include <signal.h>
#include <ucontext.h>
#endif

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "fiber.h"

namespace emulator {
namespace {

enum class State { ready, at_block, at_warp, returned };

struct Thread {
    Fiber fiber;
    Position position;
    State state;
    int lane;
    // What it waits at, and brings along.
    Site site;
    unsigned mask;
    bool vote;  // an exchange otherwise
    bool predicate;
    int source;
    std::uint64_t value;  // brought; after the wait, received
    Count count;
    std::exception_ptr fault;
};

// Fibers stay for the next launch: a thousand stacks take longer to map than a small kernel to run.
thread_local std::vector<std::unique_ptr<Thread>> pool;
thread_local Thread* running;
thread_local void (*kernel)(void**);
thread_local void** arguments;

constexpr unsigned char POISON = 0xff;  // NaN, as a float
// Behind what the launch asked for: a kernel that writes there has overrun its shared memory.
constexpr unsigned MARGIN = 1024;
alignas(16) thread_local unsigned char shared_memory[MAX_SHARED + MARGIN];

bool same(const Site& a, const Site& b) {
    return a.line == b.line && !std::strcmp(a.file, b.file) && !std::strcmp(a.name, b.name);
}

std::string text(Dim d) {
    return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

std::string text(const Site& site) {
    const char* slash = std::strrchr(site.file, '/');
    return std::string(site.name) + " (" + (slash ? slash + 1 : site.file) + ":"
        + std::to_string(site.line) + ")";
}

std::string hex(unsigned mask) {
    char digits[16];
    std::snprintf(digits, sizeof digits, "0x%08x", mask);
    return digits;
}

[[noreturn]] void fail(const Thread& thread, const std::string& what) {
    throw Fault("block " + text(thread.position.block) + ", thread " + text(thread.position.thread)
        + ": " + what);
}

void wait(State state) {
    running->state = state;
    running->fiber.leave();
}

void body() {
    for (;;) {
        try {
            kernel(arguments);
        } catch (...) {
            running->fault = std::current_exception();
        }
        wait(State::returned);
    }
}

#ifdef __x86_64__

// An access to memory that is not there becomes a fault of the launch, with the thread's place, and so
// does the instruction by which the compiler's checks end (SIGILL): the signal's handler lets the fiber
// go on in `escape`, on its own stack from the top.
thread_local bool inside = false;  // a kernel
thread_local int caught;
thread_local const void* bad_address;
struct sigaction before_segv, before_ill;

[[noreturn]] void escape() {
    inside = false;
    char address[32];
    std::snprintf(address, sizeof address, "%p", bad_address);
    std::string what = std::string("access out of bounds, at ") + address;
    if (caught == SIGILL) {
        what = "misaligned access, index beyond an array, shift or overflow that is undefined";
    } else if (running->fiber.guards(bad_address)) {
        what = "needs more than " + std::to_string(Fiber::STACK) + " bytes of local memory";
    } else if (!bad_address) {
        what = "access out of bounds, or misaligned";  // the processor does not say where
    }
    try {
        fail(*running, what);
    } catch (...) {
        running->fault = std::current_exception();
    }
    wait(State::returned);
    std::abort();
}

void on_fault(int signal, siginfo_t* info, void* context) {
    if (!inside) {
        // The same again, for whoever had it before.
        sigaction(signal, signal == SIGILL ? &before_ill : &before_segv, nullptr);
        return;
    }
    caught = signal;
    bad_address = info->si_addr;
    auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    registers[REG_RSP] = static_cast<greg_t>(running->fiber.top()) - 8;  // as after a call
    registers[REG_RIP] = reinterpret_cast<greg_t>(escape);
}

/// The handler needs a stack of its own, for the fiber's may be what ran out.
struct SignalStack {
    char bytes[64 << 10];
    stack_t others;
    SignalStack() {
        stack_t own{};
        own.ss_sp = bytes;
        own.ss_size = sizeof bytes;
        sigaltstack(&own, &others);
    }
    ~SignalStack() { sigaltstack(&others, nullptr); }
};

void catch_faults() {
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction action {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        sigaction(SIGSEGV, &action, &before_segv);
        sigaction(SIGILL, &action, &before_ill);
    });
}

#else

thread_local bool inside = false;
struct SignalStack {};
void catch_faults() {}

#endif

class Block {
  public:
    Block(int threads, bool reverse) : threads_(threads), reverse_(reverse) {}

    void run() {
        for (bool progress = true; progress;) {
            progress = false;
            const int warps = (threads_ + WARP - 1) / WARP;
            for (int i = 0; i < warps; ++i) {
                progress |= run_warp(reverse_ ? warps - 1 - i : i);
            }
            progress |= release_block();
        }
        for (int i = 0; i < threads_; ++i) {
            if (pool[i]->state != State::returned) {
                report(*pool[i]);
            }
        }
    }

  private:
    int threads_;
    bool reverse_;

    /// The thread of a lane, if there is one.
    Thread* at(int warp, int lane) const {
        const int index = warp * WARP + lane;
        return index < threads_ ? pool[index].get() : nullptr;
    }

    bool run_warp(int warp) {
        bool any = false;
        for (bool progress = true; progress;) {
            progress = false;
            for (int i = 0; i < WARP; ++i) {
                Thread* thread = at(warp, reverse_ ? WARP - 1 - i : i);
                if (thread && thread->state == State::ready) {
                    running = thread;
                    position = &thread->position;
                    inside = true;
                    thread->fiber.enter();
                    inside = false;
                    if (thread->fault) {
                        std::rethrow_exception(std::exchange(thread->fault, nullptr));
                    }
                    progress = true;
                }
            }
            for (int i = 0; i < WARP; ++i) {
                Thread* thread = at(warp, i);
                if (thread && thread->state == State::at_warp && gathered(warp, *thread)) {
                    release_warp(warp, thread->mask);
                    progress = true;
                }
            }
            any |= progress;
        }
        return any;
    }

    /// Are all lanes of the thread's mask where it is?
    bool gathered(int warp, const Thread& thread) const {
        for (int i = 0; i < WARP; ++i) {
            if (thread.mask >> i & 1) {
                const Thread* other = at(warp, i);
                if (!other || other->state != State::at_warp || other->mask != thread.mask
                    || !same(other->site, thread.site)) {
                    return false;
                }
            }
        }
        return true;
    }

    void release_warp(int warp, unsigned mask) {
        std::uint64_t values[WARP] = {};
        unsigned votes = 0;
        for (int i = 0; i < WARP; ++i) {
            if (mask >> i & 1) {
                values[i] = at(warp, i)->value;
                votes |= unsigned(at(warp, i)->predicate) << i;
            }
        }
        for (int i = 0; i < WARP; ++i) {
            if (mask >> i & 1) {
                Thread& thread = *at(warp, i);
                thread.value = thread.vote ? votes : values[thread.source];
                thread.state = State::ready;
            }
        }
    }

    /// Lets the block go on if all that have not returned are at one barrier.
    bool release_block() {
        const Thread* first = nullptr;
        Count count{0, 0};
        for (int i = 0; i < threads_; ++i) {
            const Thread& thread = *pool[i];
            if (thread.state == State::returned) {
                continue;
            }
            if (thread.state != State::at_block || (first && !same(first->site, thread.site))) {
                return false;
            }
            first = &thread;
            count.votes += thread.predicate;
            count.voters += 1;
        }
        for (int i = 0; i < threads_; ++i) {
            if (pool[i]->state == State::at_block) {
                pool[i]->count = count;
                pool[i]->state = State::ready;
            }
        }
        return first != nullptr;
    }

    /// What `thread` waits for, and who does not come.
    [[noreturn]] void report(const Thread& thread) const {
        std::string what = "waits for ever at " + text(thread.site);
        if (thread.state == State::at_warp) {
            what += " with mask " + hex(thread.mask);
        }
        for (int i = 0; i < threads_; ++i) {
            const Thread& other = *pool[i];
            const bool wanted = thread.state == State::at_block
                || (i / WARP == warp_of(thread) && thread.mask >> other.lane & 1);
            const bool there = other.state == thread.state && same(other.site, thread.site)
                && (thread.state == State::at_block || other.mask == thread.mask);
            if (!wanted || there || (thread.state == State::at_block && other.state == State::returned)) {
                continue;
            }
            what += "; thread " + text(other.position.thread)
                + (other.state == State::returned ? " has returned" : " is at " + text(other.site));
            if (other.state == State::at_warp) {
                what += " with mask " + hex(other.mask);
            }
            break;
        }
        fail(thread, what);
    }

    int warp_of(const Thread& thread) const {
        int index = 0;
        while (pool[index].get() != &thread) {
            ++index;
        }
        return index / WARP;
    }
};

/// Checks and notes what a warp intrinsic names, and waits for the others.
void wait_for_lanes(Site site, unsigned mask) {
    Thread& self = *running;
    const Dim& threads = self.position.threads;
    const Dim& thread = self.position.thread;
    const unsigned linear = thread.x + threads.x * (thread.y + threads.y * thread.z);
    const unsigned in_warp = std::min(threads.x * threads.y * threads.z - linear / WARP * WARP, 32u);
    const unsigned existing = in_warp == 32 ? ~0u : (1u << in_warp) - 1;
    if (!(mask >> self.lane & 1)) {
        fail(self, text(site) + " with mask " + hex(mask) + ", which lacks the calling lane "
            + std::to_string(self.lane));
    }
    if (mask & ~existing) {
        fail(self, text(site) + " with mask " + hex(mask) + " in a warp of "
            + std::to_string(in_warp) + " threads");
    }
    self.site = site;
    self.mask = mask;
    wait(State::at_warp);
}

}  // namespace

thread_local const Position* position;

unsigned char* dynamic_shared() { return shared_memory; }

int lane() { return running->lane; }

Count block_barrier(Site site, bool predicate) {
    running->site = site;
    running->predicate = predicate;
    wait(State::at_block);
    return running->count;
}

unsigned warp_vote(Site site, unsigned mask, bool predicate) {
    running->vote = true;
    running->predicate = predicate;
    wait_for_lanes(site, mask);
    return static_cast<unsigned>(running->value);
}

std::uint64_t warp_exchange(Site site, unsigned mask, std::uint64_t value, int source) {
    if (!(mask >> source & 1)) {
        fail(*running, text(site) + " reads lane " + std::to_string(source)
            + ", which its mask " + hex(mask) + " lacks");
    }
    running->vote = false;
    running->predicate = false;
    running->value = value;
    running->source = source;
    wait_for_lanes(site, mask);
    return running->value;
}

void trap(Site site) { fail(*running, text(site)); }

void run(void (*call)(void**), void** parameters, Dim blocks, Dim threads, unsigned shared, bool reverse) {
    const int count = static_cast<int>(threads.x * threads.y * threads.z);
    while (static_cast<int>(pool.size()) < count) {
        pool.push_back(std::make_unique<Thread>());
    }
    kernel = call;
    arguments = parameters;
    catch_faults();
    const SignalStack signal_stack;
    const std::uint64_t all = std::uint64_t(blocks.x) * blocks.y * blocks.z;
    for (std::uint64_t i = 0; i < all; ++i) {
        const std::uint64_t b = reverse ? all - 1 - i : i;
        const Dim block{unsigned(b % blocks.x), unsigned(b / blocks.x % blocks.y),
            unsigned(b / blocks.x / blocks.y)};
        for (int t = 0; t < count; ++t) {
            Thread& thread = *pool[t];
            const Dim index{t % threads.x, t / threads.x % threads.y, t / threads.x / threads.y};
            thread.position = Position{index, block, threads, blocks};
            thread.lane = t % WARP;
            thread.state = State::ready;
            thread.fault = nullptr;
            thread.fiber.begin(body);
        }
        std::memset(shared_memory, POISON, shared + MARGIN);
        Block(count, reverse).run();
        const unsigned char* behind = shared_memory + shared;
        if (std::any_of(behind, behind + MARGIN, [](unsigned char c) { return c != POISON; })) {
            throw Fault("block " + text(block) + " wrote behind its " + std::to_string(shared)
                + " bytes of dynamic shared memory");
        }
    }
}

}  // namespace emulator
