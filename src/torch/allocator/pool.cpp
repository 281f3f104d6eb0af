// An allocator for CPU tensors, which libtorch accepts only from C++. The memory is managed in pool.rs.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

extern "C" {
void* oddsmith_pool_allocate(size_t size);  // null: too small, or no room
bool oddsmith_pool_free(void* data);        // false: not of the pool
void oddsmith_pool_install();
void oddsmith_pool_uninstall();
}

namespace {

c10::Allocator* original = nullptr;

void release(void* data) {
  if (!oddsmith_pool_free(data)) {
    original->raw_deleter()(data);
  }
}

struct Pool final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    if (void* data = oddsmith_pool_allocate(size)) {
      return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
    }
    return original->allocate(size);
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return &release;
  }
  void copy_data(void* to, const void* from, size_t size) const override {
    default_copy_data(to, from, size);
  }
};

// Never destroyed: tensors may outlive every other static.
Pool& pool() {
  static Pool* instance = new Pool();
  return *instance;
}

} // namespace

void oddsmith_pool_install() {
  c10::Allocator* current = c10::GetCPUAllocator();
  // Without this deleter, raw allocations could not be freed.
  if (current != &pool() && current->raw_deleter() != nullptr) {
    original = current;
    c10::SetCPUAllocator(&pool());
  }
}

void oddsmith_pool_uninstall() {
  if (c10::GetCPUAllocator() == &pool()) {
    c10::SetCPUAllocator(original);
  }
}
