// An allocator for CPU tensors that ends each at a page which cannot be accessed: what a kernel reads or
// writes behind a tensor is a fault of its launch, as under compute-sanitizer's memcheck. Fresh memory
// is poisoned: what is read before it was written is NaN, or 255.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <mutex>
#include <unordered_map>

namespace {

constexpr std::size_t PAGE = 4096;
constexpr std::size_t ALIGNMENT = 16;  // what kernels may expect of a tensor's beginning
constexpr unsigned char POISON = 0xff;
// Each takes two of the 65,530 mappings that a process may have.
constexpr std::size_t MOST = 20'000;

struct Mapping {
    void* base;
    std::size_t length;  // without the last page
    std::size_t size;    // of the tensor
};

std::mutex mutex;
std::unordered_map<void*, Mapping> mappings;
c10::Allocator* original = nullptr;
long overwritten = 0;

std::size_t rounded_up(std::size_t size, std::size_t to) { return (size + to - 1) / to * to; }

/// Counts and repairs what was written between a tensor and its page: the bytes that alignment takes.
void inspect(void* data, const Mapping& mapping) {
    auto* end = static_cast<unsigned char*>(mapping.base) + mapping.length;
    for (auto* p = static_cast<unsigned char*>(data) + mapping.size; p < end; ++p) {
        overwritten += *p != POISON;
        *p = POISON;
    }
}

void release(void* data) {
    std::lock_guard<std::mutex> lock(mutex);
    const auto found = mappings.find(data);
    if (found == mappings.end()) {
        original->raw_deleter()(data);
        return;
    }
    const Mapping& mapping = found->second;
    inspect(data, mapping);
    munmap(mapping.base, mapping.length + PAGE);
    mappings.erase(found);
}

struct Guard final : c10::Allocator {
    c10::DataPtr allocate(std::size_t size) override {
        std::lock_guard<std::mutex> lock(mutex);
        if (size == 0 || mappings.size() >= MOST) {
            return original->allocate(size);
        }
        const std::size_t length = rounded_up(size, PAGE);
        void* base = mmap(nullptr, length + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base == MAP_FAILED) {
            return original->allocate(size);
        }
        std::memset(base, POISON, length);
        mprotect(static_cast<char*>(base) + length, PAGE, PROT_NONE);
        void* data = static_cast<char*>(base) + length - rounded_up(size, ALIGNMENT);
        mappings[data] = Mapping{base, length, size};
        return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &release; }
    void copy_data(void* to, const void* from, std::size_t size) const override {
        default_copy_data(to, from, size);
    }
};

// Never destroyed: tensors may outlive it.
Guard* const guard = new Guard();

}  // namespace

extern "C" {

void guard_install() {
    if (c10::GetCPUAllocator() != guard) {
        original = c10::GetCPUAllocator();
        c10::SetCPUAllocator(guard);
    }
}

void guard_remove() {
    if (c10::GetCPUAllocator() == guard) {
        c10::SetCPUAllocator(original);
    }
}

/// How many bytes right behind tensors have been written so far.
long guard_overwritten() {
    std::lock_guard<std::mutex> lock(mutex);
    for (const auto& [data, mapping] : mappings) {
        inspect(data, mapping);
    }
    return overwritten;
}

}  // extern "C"
