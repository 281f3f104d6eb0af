// How tests look at the emulated driver's state, and change it.
#include <cstring>

#include "state.h"

using namespace emulator;

extern "C" {

EXPORT long emulator_launches() {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    return long(launches.size());
}

/// Kernel name, sizes[7] (grid, block, shared bytes) and stream of launch `index`.
EXPORT const char* emulator_launch(long index, unsigned* sizes, void** stream) {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    if (index < 0 || index >= long(launches.size())) return nullptr;
    const Launch& launch = launches[index];
    std::memcpy(sizes, launch.grid, sizeof launch.grid);
    std::memcpy(sizes + 3, launch.block, sizeof launch.block);
    sizes[6] = launch.shared;
    *stream = launch.stream;
    return launch.kernel.c_str();
}

/// Forgets the launches, the failure that was asked for, the order, and a ruined context.
EXPORT void emulator_reset() {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    launches.clear();
    launches_until_failure = 0;
    calls.clear();
    calls_until_failure = 0;
    reverse_order = false;
    ruined = false;
    capturing.clear();
}

/// The device of launch `index`.
EXPORT int emulator_launch_device(long index) {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    return index < 0 || index >= long(launches.size()) ? -1 : device_of(launches[index].context);
}

EXPORT long emulator_calls() {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    return long(calls.size());
}

/// The name of call `index` since the last reset.
EXPORT const char* emulator_call(long index) {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    return index < 0 || index >= long(calls.size()) ? nullptr : calls[index].c_str();
}

/// The `count`-th call from now fails with this error, whatever it is; 0: none does. After CUDA_ERROR_ILLEGAL_ADDRESS
/// all later ones fail too.
EXPORT void emulator_fail_call(long count, int code) {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    calls_until_failure = count;
    failure = code;
}

/// Modules that are loaded.
EXPORT long emulator_modules() {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    return modules;
}

/// Launches on this stream are captured from now on, and not run.
EXPORT void emulator_capture(void* stream) {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    graph.clear();
    graph_is_valid = true;
    capturing.insert(stream);
}

/// Ends the capture; the number of launches in the graph, or -1 if something made it invalid.
EXPORT long emulator_end_capture() {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    capturing.clear();
    return graph_is_valid ? long(graph.size()) : -1;
}

/// Runs what was captured.
EXPORT void emulator_replay() {
    for (Node& node : graph) {
        std::vector<void*> parameters;
        for (auto& argument : node.arguments) parameters.push_back(argument.data());
        emulator::run(node.kernel->call, parameters.data(), node.grid, node.block, node.shared, false);
    }
}

/// The `count`-th launch from now fails, with CUDA_ERROR_LAUNCH_FAILED and nothing run. 0: none does.
EXPORT void emulator_fail(long count) {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    launches_until_failure = count;
}

/// Threads and blocks in descending order from now on, or ascending.
EXPORT void emulator_reverse(int reverse) {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    reverse_order = reverse != 0;
}

/// Sets a CUdevice_attribute, such as 75 and 76, the compute capability.
EXPORT void emulator_set_attribute(int attribute, int value) {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    attributes[attribute] = value;
}

/// The same of one device.
EXPORT void emulator_set_attribute_of(int device, int attribute, int value) {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    own_attributes[device][attribute] = value;
}

}  // extern "C"
