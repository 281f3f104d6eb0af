// torch's current stream, which libtorch offers only to C++. Uses the device-independent interface, so that
// no CUDA library is linked.
#include <c10/core/impl/VirtualGuardImpl.h>

#include <cstdint>

// The current stream of the calling thread, as cudaStream_t; false if torch has no such device.
extern "C" bool oddsmith_current_stream(int8_t device, uint64_t* stream) noexcept try {
  const c10::impl::VirtualGuardImpl guard(c10::DeviceType::CUDA);
  const c10::Stream current = guard.getStream(c10::Device(c10::DeviceType::CUDA, device));
  *stream = reinterpret_cast<uint64_t>(guard.getStreamNativeHandle(current));
  return true;
} catch (...) {
  return false;
}
