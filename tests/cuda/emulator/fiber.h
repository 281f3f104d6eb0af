// A stack of its own that can be left and entered again: one thread of a block.
//
// On x86-64 the switch is a dozen instructions; elsewhere ucontext, whose switch is a system call.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace emulator {

class Fiber {
  public:
    static constexpr std::size_t STACK = 128 << 10;
    static constexpr std::size_t GUARD = 4096;

    Fiber() {
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        stack_ = mmap(nullptr, STACK + GUARD, PROT_READ | PROT_WRITE, flags, -1, 0);
        // A kernel that needs more stack faults, instead of writing over its neighbour's.
        if (stack_ == MAP_FAILED || mprotect(stack_, GUARD, PROT_NONE) != 0) {
            throw std::bad_alloc();
        }
    }
    ~Fiber() { munmap(stack_, STACK + GUARD); }
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;

    /// The next `enter` calls `entry`, which never returns.
    void begin(void (*entry)());
    /// Goes into the fiber until it calls `leave`.
    void enter();
    /// Goes back to where `enter` was called.
    void leave();

    /// Where the stack begins, aligned to 16.
    std::uintptr_t top() const { return reinterpret_cast<std::uintptr_t>(stack_) + GUARD + STACK; }
    /// Is the address where an overflowing stack faults?
    bool guards(const void* address) const {
        return reinterpret_cast<std::uintptr_t>(address) - reinterpret_cast<std::uintptr_t>(stack_) < GUARD;
    }

  private:
    void* stack_;
#ifdef __x86_64__
    void* inside_ = nullptr;
    void* outside_ = nullptr;
#else
    ucontext_t inside_;
    ucontext_t outside_;
#endif
};

#ifdef __x86_64__

// Keeps what the calling convention has the callee keep, and exchanges the stacks.
extern "C" void emulator_switch(void** left, void* entered);
asm(R"(
.text
.weak emulator_switch
.hidden emulator_switch
.type emulator_switch, @function
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulator_switch, . - emulator_switch
)");

inline void Fiber::begin(void (*entry)()) {
    auto* words = reinterpret_cast<std::uintptr_t*>(top());
    // From the top: the word that a call would have pushed (for the alignment), where `ret` goes,
    // and the six registers.
    words[-2] = reinterpret_cast<std::uintptr_t>(entry);
    inside_ = words - 8;
}
inline void Fiber::enter() { emulator_switch(&outside_, inside_); }
inline void Fiber::leave() { emulator_switch(&inside_, outside_); }

#else

inline void Fiber::begin(void (*entry)()) {
    getcontext(&inside_);
    inside_.uc_stack.ss_sp = static_cast<char*>(stack_) + GUARD;
    inside_.uc_stack.ss_size = STACK;
    inside_.uc_link = nullptr;
    makecontext(&inside_, entry, 0);
}
inline void Fiber::enter() { swapcontext(&outside_, &inside_); }
inline void Fiber::leave() { swapcontext(&inside_, &outside_); }

#endif

}  // namespace emulator
