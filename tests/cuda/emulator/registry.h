// The kernels by name, with the types of their parameters.
#pragma once

#include <cstddef>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace emulator {

struct Kernel {
    std::string name;
    void (*call)(void** parameters);
    std::vector<std::size_t> sizes;  // of the parameters, in bytes
    unsigned max_threads;            // __launch_bounds__, or 1024
};

inline std::map<std::string, Kernel>& registry() {
    static std::map<std::string, Kernel> kernels;
    return kernels;
}

template <auto F>
struct Caller;

template <typename... A, void (*F)(A...)>
struct Caller<F> {
    static void call(void** parameters) { call(parameters, std::index_sequence_for<A...>()); }
    template <std::size_t... I>
    static void call([[maybe_unused]] void** parameters, std::index_sequence<I...>) {
        F(*static_cast<A*>(parameters[I])...);
    }
    static std::vector<std::size_t> sizes() { return {sizeof(A)...}; }
};

/// Of the arguments of __launch_bounds__: how many threads a block may have.
template <typename... Rest>
constexpr unsigned first(unsigned max_threads, Rest...) {
    return max_threads;
}

template <auto F>
bool enter(const char* name, unsigned max_threads = 1024) {
    return registry().emplace(name, Kernel{name, Caller<F>::call, Caller<F>::sizes(), max_threads}).second;
}

}  // namespace emulator
