// The part of the CUDA driver API that src/cuda uses, on the host: a few devices, kernels that run while
// they are launched, or when a graph that captured them is replayed. The names, numbers and order of arguments are
// those of cuda.h. Tests look at its state, and change it, by the functions of control.cpp.
#include <cstdlib>
#include <cstring>
#include <exception>
#include <sstream>
#include <unistd.h>

#include "state.h"

using namespace emulator;

namespace {

/// The section names of a cubin (a 64-bit ELF file): a kernel's code is in `.text.<kernel>`.
std::string section_names(const char* image) {
    std::uint64_t table, names_offset, names_size;
    std::uint16_t entry_size, names_index;
    std::memcpy(&table, image + 0x28, 8);
    std::memcpy(&entry_size, image + 0x3a, 2);
    std::memcpy(&names_index, image + 0x3e, 2);
    const char* entry = image + table + std::size_t(entry_size) * names_index;
    std::memcpy(&names_offset, entry + 0x18, 8);
    std::memcpy(&names_size, entry + 0x20, 8);
    return std::string(image + names_offset, names_size);
}

std::string check(const Function& function, Dim grid, Dim block, unsigned shared) {
    const std::uint64_t threads = std::uint64_t(block.x) * block.y * block.z;
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535) {
        return "grid out of range";
    }
    if (threads == 0 || threads > function.kernel->max_threads || block.z > 64) {
        return std::to_string(threads) + " threads a block, of at most "
            + std::to_string(function.kernel->max_threads);
    }
    if (shared > unsigned(function.dynamic_shared)) {
        return std::to_string(shared) + " bytes of dynamic shared memory, of "
            + std::to_string(function.dynamic_shared) + " allowed";
    }
    return "";
}

/// What is to go wrong with kernels whose names contain `kernel`, or are what comes behind its `=`.
struct Wanted {
    std::string mode, kernel;
    std::size_t parameter = 0, offset = 3;

    bool is_of(const std::string& name) const {
        return kernel.rfind("=", 0) == 0 ? kernel.substr(1) == name : name.find(kernel) != std::string::npos;
    }
};

/// The fault of a kernel in EMULATOR_FAULT, which has `mode:kernel[:parameter[:offset]]`, separated by commas:
///
/// - `load`: its module cannot be loaded;
/// - `bounds`: the pointer in a parameter is far out of bounds, and then the context is ruined;
/// - `hang`: it never ends;
/// - `wrong`: afterwards a bit of a byte behind the pointer in a parameter is another: of the exponent of a float,
///   or of the second of two 16-bit numbers.
Wanted fault_of(const std::string& mode_or_any, const std::string& kernel) {
    const char* all = std::getenv("EMULATOR_FAULT");
    std::istringstream faults(all ? all : "");
    for (std::string text; std::getline(faults, text, ',');) {
        std::istringstream parts(text);
        Wanted fault;
        std::string number;
        std::getline(parts, fault.mode, ':');
        std::getline(parts, fault.kernel, ':');
        if (std::getline(parts, number, ':')) fault.parameter = std::stoul(number);
        if (std::getline(parts, number, ':')) fault.offset = std::stoul(number);
        const bool wanted = mode_or_any.empty() ? fault.mode != "load" : fault.mode == mode_or_any;
        if (wanted && fault.is_of(kernel)) return fault;
    }
    return Wanted{};
}

/// Runs a kernel with its fault.
void run_with(const Wanted& fault, const Kernel& kernel, void** parameters, Dim grid, Dim block, unsigned shared,
    bool reverse) {
    while (fault.mode == "hang") {
        pause();
    }
    std::vector<void*> given(parameters, parameters + kernel.sizes.size());
    unsigned char* pointer = nullptr;
    // A struct begins with the pointer.
    std::vector<unsigned char> moved;
    if (!fault.mode.empty()) {
        const auto* from = static_cast<unsigned char*>(given.at(fault.parameter));
        moved.assign(from, from + kernel.sizes[fault.parameter]);
        std::memcpy(&pointer, from, sizeof pointer);
        const std::uintptr_t away = reinterpret_cast<std::uintptr_t>(pointer) + (1ull << 46);
        std::memcpy(moved.data(), &away, sizeof away);
    }
    if (fault.mode == "bounds") given[fault.parameter] = moved.data();
    emulator::run(kernel.call, given.data(), grid, block, shared, reverse);
    if (fault.mode == "wrong") pointer[fault.offset] ^= 0x40;
}

}  // namespace

extern "C" {
#define COUNTED \
    std::lock_guard<std::recursive_mutex> lock(mutex); \
    if (const int code = counted(__func__)) return code
#define READY \
    COUNTED; \
    if (!initialised) return fail(NOT_INITIALIZED, std::string(__func__) + " before cuInit"); \
    if (ruined) return ILLEGAL_ADDRESS
#define REQUIRE(condition) \
    if (!(condition)) return fail(INVALID_VALUE, std::string(__func__) + ": not " #condition)

EXPORT int cuInit(unsigned flags) {
    COUNTED;
    REQUIRE(flags == 0);
    initialised = true;
    return SUCCESS;
}

EXPORT int cuDriverGetVersion(int* version) {
    COUNTED;
    REQUIRE(version);
#ifdef SMALL_ARGUMENTS
    *version = 12000;
#else
    *version = 13000;
#endif
    return SUCCESS;
}

EXPORT int cuDeviceGetCount(int* count) {
    READY;
    REQUIRE(count);
    *count = DEVICES;
    return SUCCESS;
}

EXPORT int cuDeviceGet(int* device, int ordinal) {
    READY;
    REQUIRE(device && ordinal >= 0 && ordinal < DEVICES);
    *device = ordinal;
    return SUCCESS;
}

EXPORT int cuDeviceGetAttribute(int* value, int attribute, int device) {
    READY;
    REQUIRE(value && device >= 0 && device < DEVICES);
    const auto own = own_attributes[device].find(attribute);
    if (own != own_attributes[device].end()) {
        *value = own->second;
        return SUCCESS;
    }
    const auto found = attributes.find(attribute);
    if (found == attributes.end()) {
        return fail(INVALID_VALUE, "the emulator does not know attribute " + std::to_string(attribute));
    }
    *value = found->second;
    return SUCCESS;
}

EXPORT int cuDevicePrimaryCtxRetain(void** context, int device) {
    READY;
    REQUIRE(context && device >= 0 && device < DEVICES);
    *context = &contexts[device];
    return SUCCESS;
}

EXPORT int cuDevicePrimaryCtxRelease_v2(int device) {
    READY;
    REQUIRE(device >= 0 && device < DEVICES);
    return SUCCESS;
}

EXPORT int cuCtxGetCurrent(void** context) {
    READY;
    REQUIRE(context);
    *context = current;
    return SUCCESS;
}

EXPORT int cuCtxSetCurrent(void* context) {
    READY;
    REQUIRE(context == nullptr || device_of(context) >= 0);
    current = context;
    return SUCCESS;
}

EXPORT int cuCtxSynchronize() {
    READY;
    return current ? SUCCESS : fail(INVALID_CONTEXT, "no current context");
}

EXPORT int cuModuleLoadData(void** module, const void* image) {
    READY;
    REQUIRE(module && image);
    if (!current) return fail(INVALID_CONTEXT, "cuModuleLoadData without a current context");
    if (!capturing.empty()) {
        graph_is_valid = false;
        return fail(CAPTURE_UNSUPPORTED, "cuModuleLoadData while a graph is captured");
    }
    const bool is_elf = !std::memcmp(image, "\177ELF\2", 5);
    const std::string names = is_elf ? section_names(static_cast<const char*>(image)) : "";
    if (!fault_of("load", is_elf ? names : static_cast<const char*>(image)).mode.empty()) {
        return fail(NO_BINARY_FOR_GPU, "the module cannot be loaded, on request");
    }
    *module = new Module{names, is_elf, current};
    ++modules;
    return SUCCESS;
}

EXPORT int cuModuleUnload(void* module) {
    READY;
    REQUIRE(module);
    delete static_cast<Module*>(module);
    --modules;
    return SUCCESS;
}

EXPORT int cuModuleGetFunction(void** function, void* module, const char* name) {
    READY;
    REQUIRE(function && module && name);
    const auto& loaded = *static_cast<Module*>(module);
    const std::string section = std::string(".text.") + name + '\0';
    if (loaded.is_elf && loaded.image.find(section) == std::string::npos) {
        return fail(NOT_FOUND, std::string(name) + " is not in the module");
    }
    const auto found = emulator::registry().find(name);
    if (found == emulator::registry().end()) {
        return fail(NOT_FOUND, std::string(name) + " is not among the emulated kernels");
    }
    functions.push_back(Function{&found->second, loaded.context});
    *function = &functions.back();
    return SUCCESS;
}

EXPORT int cuFuncSetAttribute(void* function, int attribute, int value) {
    READY;
    REQUIRE(function);
    REQUIRE(attribute == 8 || attribute == 9);  // dynamic shared memory; carve-out
    if (attribute == 8) {
        REQUIRE(value >= 0 && value <= int(emulator::MAX_SHARED));
        static_cast<Function*>(function)->dynamic_shared = value;
    }
    return SUCCESS;
}

EXPORT int cuFuncGetAttribute(int* value, int attribute, void* function) {
    READY;
    REQUIRE(value && function);
    const auto& asked = *static_cast<Function*>(function);
    switch (attribute) {
        case 0: *value = int(asked.kernel->max_threads); return SUCCESS;
        case 1: case 2: case 3: *value = 0; return SUCCESS;  // shared, constant, local bytes
        case 4: *value = 32; return SUCCESS;                 // registers
        case 8: *value = asked.dynamic_shared; return SUCCESS;
        default: return fail(INVALID_VALUE, "function attribute " + std::to_string(attribute));
    }
}

EXPORT int cuFuncGetParamInfo(void* function, std::size_t index, std::size_t* offset, std::size_t* size) {
    READY;
    REQUIRE(function && offset);
    const auto& sizes = static_cast<Function*>(function)->kernel->sizes;
    if (index >= sizes.size()) return fail(INVALID_VALUE, "no such parameter");
    std::size_t end = 0;
    for (std::size_t i = 0; i <= index; ++i) {
        *offset = (end + sizes[i] - 1) / sizes[i] * sizes[i];  // scalars and pointers
        end = *offset + sizes[i];
    }
    if (size) *size = sizes[index];
    return SUCCESS;
}

EXPORT int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void* function, int threads, std::size_t) {
    READY;
    REQUIRE(blocks && function && threads > 0);
    *blocks = 2048 / threads;
    return SUCCESS;
}

EXPORT int cuStreamIsCapturing(void* stream, int* status) {
    READY;
    REQUIRE(status);
    *status = int(capturing.count(stream));
    return SUCCESS;
}

EXPORT int cuStreamSynchronize(void*) {
    READY;
    return SUCCESS;
}

EXPORT int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
    unsigned block_y, unsigned block_z, unsigned shared, void* stream, void** parameters, void** extra) {
    const Dim grid{grid_x, grid_y, grid_z}, block{block_x, block_y, block_z};
    bool reverse;
    {
        READY;
        REQUIRE(function && !extra);
        if (!current) return fail(INVALID_CONTEXT, "cuLaunchKernel without a current context");
        const auto& launched = *static_cast<Function*>(function);
        if (launched.context != current) return fail(INVALID_HANDLE, "a function of another context");
        REQUIRE(parameters || launched.kernel->sizes.empty());
        const std::string wrong = check(launched, grid, block, shared);
        if (!wrong.empty()) return fail(INVALID_VALUE, launched.kernel->name + ": " + wrong);
        launches.push_back(Launch{launched.kernel->name, {grid_x, grid_y, grid_z}, {block_x, block_y, block_z},
            shared, stream, current});
        if (launches_until_failure > 0 && --launches_until_failure == 0) {
            return fail(LAUNCH_FAILED, launched.kernel->name + ": failed on request");
        }
        reverse = reverse_order;
        if (capturing.count(stream)) {
            Node node{launched.kernel, {}, grid, block, shared};
            for (std::size_t i = 0; i < launched.kernel->sizes.size(); ++i) {
                const auto* from = static_cast<unsigned char*>(parameters[i]);
                node.arguments.emplace_back(from, from + launched.kernel->sizes[i]);
            }
            graph.push_back(node);
            return SUCCESS;
        }
    }
    const Kernel& kernel = *static_cast<Function*>(function)->kernel;
    const Wanted wanted = fault_of("", kernel.name);
    try {
        run_with(wanted, kernel, parameters, grid, block, shared, reverse);
    } catch (const std::exception& fault) {
        std::lock_guard<std::recursive_mutex> lock(mutex);
        ruined = wanted.mode == "bounds";
        return fail(ruined ? ILLEGAL_ADDRESS : LAUNCH_FAILED, kernel.name + ": " + fault.what());
    }
    return SUCCESS;
}

EXPORT int cuGetErrorName(int error, const char** name) {
    switch (error) {
        case SUCCESS: *name = "CUDA_SUCCESS"; return SUCCESS;
        case INVALID_VALUE: *name = "CUDA_ERROR_INVALID_VALUE"; return SUCCESS;
        case NOT_INITIALIZED: *name = "CUDA_ERROR_NOT_INITIALIZED"; return SUCCESS;
        case INVALID_IMAGE: *name = "CUDA_ERROR_INVALID_IMAGE"; return SUCCESS;
        case INVALID_CONTEXT: *name = "CUDA_ERROR_INVALID_CONTEXT"; return SUCCESS;
        case NO_BINARY_FOR_GPU: *name = "CUDA_ERROR_NO_BINARY_FOR_GPU"; return SUCCESS;
        case ILLEGAL_ADDRESS: *name = "CUDA_ERROR_ILLEGAL_ADDRESS"; return SUCCESS;
        case 2: *name = "CUDA_ERROR_OUT_OF_MEMORY"; return SUCCESS;
        case INVALID_HANDLE: *name = "CUDA_ERROR_INVALID_HANDLE"; return SUCCESS;
        case CAPTURE_UNSUPPORTED: *name = "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"; return SUCCESS;
        case NOT_FOUND: *name = "CUDA_ERROR_NOT_FOUND"; return SUCCESS;
        case LAUNCH_FAILED: *name = "CUDA_ERROR_LAUNCH_FAILED"; return SUCCESS;
        default: *name = nullptr; return INVALID_VALUE;
    }
}

/// The reason, where a driver has a sentence for the number only: what was wrong is then in the
/// exception that a test sees.
EXPORT int cuGetErrorString(int error, const char** text) {
    thread_local std::string kept;
    std::lock_guard<std::recursive_mutex> lock(mutex);
    kept = error == SUCCESS ? "no error" : message;
    *text = kept.c_str();
    return SUCCESS;
}

}  // extern "C"
