// The stream that torch launches on, which libtorch offers to C++ alone. Through the interface of all
// devices, so that nothing of CUDA is linked.
#include <c10/core/impl/VirtualGuardImpl.h>

#include <cstdint>

// The stream that is current on the calling thread, as cudaStream_t; false if torch has no such device.
extern "C" bool oddsmith_current_stream(int8_t device, uint64_t* stream) noexcept try {
  const c10::impl::VirtualGuardImpl guard(c10::DeviceType::CUDA);
  const c10::Stream current = guard.getStream(c10::Device(c10::DeviceType::CUDA, device));
  *stream = reinterpret_cast<uint64_t>(guard.getStreamNativeHandle(current));
  return true;
} catch (...) {
  return false;
}
