// NVRTC without a compiler, for the emulated driver, which has the kernels already: an image is the name of its
// source. Sources that EMULATOR_COMPILE_ERROR names, separated by commas, do not compile.
//
// The `emulator_*` functions at the end are for tests.
#include <cstdlib>
#include <cstring>
#include <string>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

struct Program {
    std::string name, log;
};

std::string image(const Program& program) { return "image of " + program.name; }

Program& program(void* handle) { return *static_cast<Program*>(handle); }

// Calls so far, the one that is to fail, counted from now, and programs that are not destroyed.
long calls = 0, calls_until_failure = 0, programs = 0;

/// NVRTC_ERROR_INTERNAL_ERROR for the call that is to fail.
int counted() {
    ++calls;
    return calls_until_failure > 0 && --calls_until_failure == 0 ? 11 : 0;
}

}  // namespace

EXPORT int nvrtcVersion(int* major, int* minor) {
    if (const int code = counted()) return code;
    // No release of the real one, so that nobody takes an image of the cache for a cubin.
    *major = 99;
    *minor = 0;
    return 0;
}

EXPORT const char* nvrtcGetErrorString(int error) {
    return error == 6 ? "NVRTC_ERROR_COMPILATION" : error == 11 ? "NVRTC_ERROR_INTERNAL_ERROR" : "NVRTC_SUCCESS";
}

EXPORT int nvrtcCreateProgram(void** handle, const char*, const char* name, int, const char* const*, const char* const*) {
    if (const int code = counted()) return code;
    *handle = new Program{name, ""};
    ++programs;
    return 0;
}

EXPORT int nvrtcDestroyProgram(void** handle) {
    delete static_cast<Program*>(*handle);
    --programs;
    return counted();
}

EXPORT int nvrtcCompileProgram(void* handle, int, const char* const*) {
    if (const int code = counted()) return code;
    const char* broken = std::getenv("EMULATOR_COMPILE_ERROR");
    const std::string names = "," + std::string(broken ? broken : "") + ",";
    if (names.find("," + program(handle).name + ",") == std::string::npos) return 0;
    program(handle).log = program(handle).name + "(1): error: broken on purpose";
    return 6;
}

EXPORT int nvrtcGetProgramLogSize(void* handle, std::size_t* size) {
    if (const int code = counted()) return code;
    *size = program(handle).log.size() + 1;
    return 0;
}

EXPORT int nvrtcGetProgramLog(void* handle, char* log) {
    if (const int code = counted()) return code;
    std::strcpy(log, program(handle).log.c_str());
    return 0;
}

EXPORT int nvrtcGetCUBINSize(void* handle, std::size_t* size) {
    if (const int code = counted()) return code;
    *size = image(program(handle)).size() + 1;
    return 0;
}

EXPORT int nvrtcGetCUBIN(void* handle, char* cubin) {
    if (const int code = counted()) return code;
    std::strcpy(cubin, image(program(handle)).c_str());
    return 0;
}

// ---- for tests ----

EXPORT long emulator_compiler_calls() { return calls; }

/// The `count`-th call from now fails; 0: none does.
EXPORT void emulator_fail_compiler_call(long count) { calls_until_failure = count; }

EXPORT long emulator_programs() { return programs; }
