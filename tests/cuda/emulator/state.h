// What the emulated driver knows: its contexts, launches, calls and graph, under one lock.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "block.h"
#include "registry.h"

#define EXPORT __attribute__((visibility("default")))

namespace emulator {

enum Result {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    NOT_INITIALIZED = 3,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    NO_BINARY_FOR_GPU = 209,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    ILLEGAL_ADDRESS = 700,
    LAUNCH_FAILED = 719,
    CAPTURE_UNSUPPORTED = 900,
};

struct Module {
    std::string image;  // the names in it, where it is a cubin
    bool is_elf;
    void* context;
};

struct Function {
    const Kernel* kernel;
    void* context;
    int dynamic_shared = 48 << 10;
};

/// A launch that a graph captured, with a copy of its arguments.
struct Node {
    const Kernel* kernel;
    std::vector<std::vector<unsigned char>> arguments;
    Dim grid, block;
    unsigned shared;
};

struct Launch {
    std::string kernel;
    unsigned grid[3], block[3], shared;
    void* stream;
    void* context;
};

inline std::recursive_mutex mutex;
inline bool initialised = false;
constexpr int DEVICES = 3;
inline int contexts[DEVICES];  // their addresses are the primary contexts
inline thread_local void* current = nullptr;
inline std::deque<Function> functions;
inline std::deque<Launch> launches;
inline long launches_until_failure = 0;
inline bool reverse_order = false;
// As a context after an illegal address: every later call fails.
inline bool ruined = false;
// Why the last call failed; LAUNCH_FAILED's description.
inline std::string message;

// The calls so far, by name; the one that is to fail, counted from now, and how.
inline std::deque<std::string> calls;
inline long calls_until_failure = 0;
inline int failure = 0;
// What has to be given back at the end.
inline long modules = 0;
// Streams on which a graph is captured, and what it has.
inline std::set<void*> capturing;
inline std::vector<Node> graph;
inline bool graph_is_valid = true;

// CUdevice_attribute, where a device does not have its own
inline std::map<int, int> own_attributes[DEVICES];
inline std::map<int, int> attributes = {
    {1, 1024},               // threads of a block
    {2, 1024}, {3, 1024}, {4, 64},
    {5, 2147483647}, {6, 65535}, {7, 65535},
    {8, 48 << 10},           // shared memory of a block without asking for more
    {10, 32},                // lanes of a warp
    {12, 65536},             // registers of a block
    {16, 132},               // multiprocessors
    {38, 50 << 20},          // bytes of L2
    {39, 2048},              // threads of a multiprocessor
    {75, 9}, {76, 0},        // compute capability
    {81, 228 << 10},         // shared memory of a multiprocessor
    {97, MAX_SHARED},
};

inline int fail(Result result, const std::string& why) {
    message = why;
    return result;
}

/// Counts a call; its error, if it is the one that is to fail.
inline int counted(const char* name) {
    calls.push_back(name);
    if (calls_until_failure > 0 && --calls_until_failure == 0) {
        message = std::string(name) + ": failed on request";
        ruined = failure == ILLEGAL_ADDRESS;
        return failure;
    }
    return SUCCESS;
}

inline int device_of(const void* context) {
    const auto* own = static_cast<const int*>(context);
    return own >= contexts && own < contexts + DEVICES ? int(own - contexts) : -1;
}

}  // namespace emulator
