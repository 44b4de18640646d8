// Stands in for the CUDA driver, so that fake tensors "on a GPU" get through PyTorch's backward pass without one.
//
// gpu_count.py compiles and loads it. install_guard: a device guard for CUDA that does nothing. no_context: PyTorch asks
// its CUDA hooks, which no public function replaces, whether the driver has a context; a copy of their table of virtual
// functions answers no.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <cstdlib>
#include <cstring>

using namespace c10;

namespace {
struct NoDevice final : public impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return Device(DeviceType::CUDA, 0); }
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device d) const override { return Stream(Stream::DEFAULT, d); }
  Stream getNewStream(Device d, int) const override { return Stream(Stream::DEFAULT, d); }
  Stream getDefaultStream(Device d) const override { return Stream(Stream::DEFAULT, d); }
  Stream exchangeStream(Stream s) const override { return s; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  void synchronizeStream(const Stream&) const override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeEvent(void*) const override {}
};

NoDevice guard;
constexpr size_t kEntries = 125;  // more than the table has

bool no(void*, DeviceIndex) { return false; }
}  // namespace

extern "C" void install_guard() {
  impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)].store(&guard);
}

extern "C" void no_context() {
  const at::CUDAHooksInterface& hooks = at::detail::getCUDAHooks();
  auto member = &at::CUDAHooksInterface::hasPrimaryContext;
  size_t offset;  // Itanium ABI: 1 + the offset in bytes
  std::memcpy(&offset, &member, sizeof offset);
  void*** object = (void***)&hooks;
  void** copy = (void**)std::malloc(sizeof(void*) * (kEntries + 5));
  std::memcpy(copy, *object - 2, sizeof(void*) * kEntries);  // with the two entries before the first function
  copy[2 + (offset - 1) / sizeof(void*)] = (void*)&no;
  *object = copy + 2;
}
