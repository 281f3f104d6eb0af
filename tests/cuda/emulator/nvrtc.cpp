// NVRTC without a compiler, for the emulated driver, which has the kernels already: an image is the name of its
// source. Sources that EMULATOR_COMPILE_ERROR names, separated by commas, do not compile.
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

}  // namespace

EXPORT int nvrtcVersion(int* major, int* minor) {
    // No release of the real one, so that nobody takes an image of the cache for a cubin.
    *major = 99;
    *minor = 0;
    return 0;
}

EXPORT const char* nvrtcGetErrorString(int error) { return error == 6 ? "NVRTC_ERROR_COMPILATION" : "NVRTC_SUCCESS"; }

EXPORT int nvrtcCreateProgram(void** handle, const char*, const char* name, int, const char* const*, const char* const*) {
    *handle = new Program{name, ""};
    return 0;
}

EXPORT int nvrtcDestroyProgram(void** handle) {
    delete static_cast<Program*>(*handle);
    return 0;
}

EXPORT int nvrtcCompileProgram(void* handle, int, const char* const*) {
    const char* broken = std::getenv("EMULATOR_COMPILE_ERROR");
    const std::string names = "," + std::string(broken ? broken : "") + ",";
    if (names.find("," + program(handle).name + ",") == std::string::npos) return 0;
    program(handle).log = program(handle).name + "(1): error: broken on purpose";
    return 6;
}

EXPORT int nvrtcGetProgramLogSize(void* handle, std::size_t* size) {
    *size = program(handle).log.size() + 1;
    return 0;
}

EXPORT int nvrtcGetProgramLog(void* handle, char* log) {
    std::strcpy(log, program(handle).log.c_str());
    return 0;
}

EXPORT int nvrtcGetCUBINSize(void* handle, std::size_t* size) {
    *size = image(program(handle)).size() + 1;
    return 0;
}

EXPORT int nvrtcGetCUBIN(void* handle, char* cubin) {
    std::strcpy(cubin, image(program(handle)).c_str());
    return 0;
}
