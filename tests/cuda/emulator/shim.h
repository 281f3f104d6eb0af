// CUDA C++ for the host's compiler: what kernels/*.cu may use, and nothing else, so that what is not
// here does not compile. A kernel is included inside `namespace device`.
//
// Functions that round follow IEEE 754 to the bit (the __f*_rn family, fmaf, division, sqrtf); the
// others are rounded correctly, where a device may be off by an ulp or two. Neither the host's compiler
// (-ffp-contract=off) nor NVRTC (--fmad=false) makes a fused a * b + c of two operations.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "block.h"

#define __global__
#define __device__
#define __host__
// Of the block, while it runs: blocks of one OS thread come one after the other.
#define __shared__ static thread_local
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
// A parameter that is read where it is, and not copied.
#define __grid_constant__

#define threadIdx (::emulator::position->thread)
#define blockIdx (::emulator::position->block)
#define blockDim (::emulator::position->threads)
#define gridDim (::emulator::position->blocks)

// The place in the source of a call; as default arguments, these are the caller's.
#define SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define HERE \
    ::emulator::Site { __func__, file, line }

namespace device {

constexpr int warpSize = 32;
using dim3 = ::emulator::Dim;

// ---- vectors ----

template <typename T, int Bytes>
struct alignas(Bytes) Two {
    T x, y;
};
template <typename T, int Bytes>
struct alignas(Bytes) Four {
    T x, y, z, w;
};
using uchar2 = Two<unsigned char, 2>;
using uchar4 = Four<unsigned char, 4>;
using ushort2 = Two<unsigned short, 4>;
using ushort4 = Four<unsigned short, 8>;
using int2 = Two<int, 8>;
using int4 = Four<int, 16>;
using uint2 = Two<unsigned, 8>;
using uint4 = Four<unsigned, 16>;
using float2 = Two<float, 8>;
using float4 = Four<float, 16>;
inline uchar2 make_uchar2(unsigned char x, unsigned char y) { return {x, y}; }
inline uchar4 make_uchar4(unsigned char x, unsigned char y, unsigned char z, unsigned char w) {
    return {x, y, z, w};
}
inline ushort2 make_ushort2(unsigned short x, unsigned short y) { return {x, y}; }
inline ushort4 make_ushort4(unsigned short x, unsigned short y, unsigned short z, unsigned short w) {
    return {x, y, z, w};
}
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ---- bits ----

template <typename To, typename From>
inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
inline unsigned __float_as_uint(float v) { return bits_as<unsigned>(v); }
inline int __float_as_int(float v) { return bits_as<int>(v); }
inline float __uint_as_float(unsigned v) { return bits_as<float>(v); }
inline float __int_as_float(int v) { return bits_as<float>(v); }
inline long long __double_as_longlong(double v) { return bits_as<long long>(v); }
inline double __longlong_as_double(long long v) { return bits_as<double>(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __clz(int v) { return v ? __builtin_clz(static_cast<unsigned>(v)) : 32; }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline unsigned __brev(unsigned v) {
    unsigned r = 0;
    for (int i = 0; i < 32; ++i) r |= (v >> i & 1) << (31 - i);
    return r;
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const std::uint64_t both = std::uint64_t(high) << 32 | low;
    unsigned r = 0;
    for (int i = 0; i < 4; ++i) r |= unsigned(both >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return r;
}

// ---- arithmetic ----

// One rounding each, whatever the compiler would like to contract.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float fmaf(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }

// Through double: wrong only where a double is within 2^-29 of a tie.
#define ROUNDED(name, expression) \
    inline float name(float v) { \
        const double x = v; \
        return static_cast<float>(expression); \
    }
ROUNDED(expf, std::exp(x))
ROUNDED(exp2f, std::exp2(x))
ROUNDED(expm1f, std::expm1(x))
ROUNDED(logf, std::log(x))
ROUNDED(log2f, std::log2(x))
ROUNDED(log10f, std::log10(x))
ROUNDED(log1pf, std::log1p(x))
ROUNDED(tanhf, std::tanh(x))
ROUNDED(rsqrtf, 1.0 / std::sqrt(x))
ROUNDED(__expf, std::exp(x))
ROUNDED(__logf, std::log(x))
ROUNDED(__log2f, std::log2(x))
#undef ROUNDED
inline float powf(float a, float b) { return static_cast<float>(std::pow(double(a), double(b))); }
inline float __fdividef(float a, float b) { return a / b; }
inline float sqrtf(float v) { return std::sqrt(v); }
inline float fabsf(float v) { return std::fabs(v); }
inline float fmaxf(float a, float b) { return std::fmax(a, b); }
inline float fminf(float a, float b) { return std::fmin(a, b); }
inline float floorf(float v) { return std::floor(v); }
inline float ceilf(float v) { return std::ceil(v); }
inline float truncf(float v) { return std::trunc(v); }
inline float rintf(float v) { return std::nearbyint(v); }
inline float copysignf(float a, float b) { return std::copysign(a, b); }
inline float ldexpf(float a, int b) { return std::ldexp(a, b); }
inline float __saturatef(float v) { return v > 0 ? (v < 1 ? v : 1.0f) : 0.0f; }
using std::exp, std::expm1, std::fabs, std::fma, std::isfinite, std::isinf, std::isnan, std::log,
    std::log1p, std::signbit, std::sqrt;

template <typename T>
inline T min(T a, T b) {
    return b < a ? b : a;
}
template <typename T>
inline T max(T a, T b) {
    return a < b ? b : a;
}
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }

/// Saturates and takes NaN to 0, as the instruction does.
inline int __float2int_rn(float v) {
    if (std::isnan(v)) return 0;
    const float whole = std::nearbyint(v);
    return whole >= 2147483648.0f ? INT32_MAX : whole < -2147483648.0f ? INT32_MIN : int(whole);
}
inline int __float2int_rz(float v) { return __float2int_rn(std::trunc(v)); }
inline unsigned __float2uint_rn(float v) {
    if (!(v > 0)) return 0;
    const float whole = std::nearbyint(v);
    return whole >= 4294967296.0f ? UINT32_MAX : unsigned(whole);
}
inline unsigned __float2uint_rz(float v) { return __float2uint_rn(std::trunc(v)); }
inline float __int2float_rn(int v) { return static_cast<float>(v); }
inline float __uint2float_rn(unsigned v) { return static_cast<float>(v); }

// ---- memory ----

template <typename T> inline T __ldg(const T* p) { return *p; }
template <typename T> inline T __ldca(const T* p) { return *p; }
template <typename T> inline T __ldcg(const T* p) { return *p; }
template <typename T> inline T __ldcs(const T* p) { return *p; }
template <typename T> inline void __stcg(T* p, T v) { *p = v; }
template <typename T> inline void __stcs(T* p, T v) { *p = v; }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void __threadfence_block() {}

/// Replaces `*p` by `change(*p)` and returns what was there, safe against other OS threads: a launch
/// on another stream may come from one.
template <typename T, typename Change>
inline T atomically(T* p, Change change) {
    T old, next;
    __atomic_load(p, &old, __ATOMIC_RELAXED);
    do {
        next = change(old);
    } while (!__atomic_compare_exchange(p, &old, &next, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED));
    return old;
}
// The types of the hardware: no others compile.
#define ATOMIC(name, T, expression) \
    inline T name(T* p, T v) { \
        return atomically(p, [v](T old) -> T { return expression; }); \
    }
#define ATOMIC_INTEGERS(name, expression) \
    ATOMIC(name, int, expression) \
    ATOMIC(name, unsigned, expression) \
    ATOMIC(name, unsigned long long, expression)
ATOMIC_INTEGERS(atomicAdd, old + v)
ATOMIC(atomicAdd, float, old + v)
ATOMIC(atomicAdd, double, old + v)
ATOMIC_INTEGERS(atomicMax, old < v ? v : old)
ATOMIC_INTEGERS(atomicMin, v < old ? v : old)
ATOMIC_INTEGERS(atomicOr, old | v)
ATOMIC_INTEGERS(atomicAnd, old & v)
ATOMIC_INTEGERS(atomicExch, v)
ATOMIC(atomicExch, float, v)
#undef ATOMIC
#undef ATOMIC_INTEGERS
template <typename T>
inline T atomicCAS(T* p, T expected, T v) {
    static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
    return atomically(p, [&](T old) { return old == expected ? v : old; });
}

// ---- barriers and warps ----

inline void __syncthreads(SITE) { emulator::block_barrier(HERE, false); }
inline int __syncthreads_count(int v, SITE) { return emulator::block_barrier(HERE, v != 0).votes; }
inline int __syncthreads_or(int v, SITE) { return emulator::block_barrier(HERE, v != 0).votes != 0; }
inline int __syncthreads_and(int v, SITE) {
    const auto count = emulator::block_barrier(HERE, v != 0);
    return count.votes == count.voters;
}
inline void __syncwarp(unsigned mask = ~0u, SITE) { emulator::warp_vote(HERE, mask, false); }
inline unsigned __ballot_sync(unsigned mask, int v, SITE) {
    return emulator::warp_vote(HERE, mask, v != 0);
}
inline int __any_sync(unsigned mask, int v, SITE) {
    return emulator::warp_vote(HERE, mask, v != 0) != 0;
}
inline int __all_sync(unsigned mask, int v, SITE) {
    return emulator::warp_vote(HERE, mask, v != 0) == mask;
}

template <typename T>
inline T exchange(emulator::Site site, unsigned mask, T value, int source) {
    static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
    std::uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = emulator::warp_exchange(site, mask, bits, source);
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
// A lane whose source is outside its segment of `width` lanes keeps its own value.
template <typename T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, SITE) {
    const int lane = emulator::lane();
    return exchange(HERE, mask, value, (lane & ~(width - 1)) | (source & (width - 1)));
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, SITE) {
    const int lane = emulator::lane(), source = lane ^ bits;
    return exchange(HERE, mask, value, source <= (lane | (width - 1)) ? source : lane);
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32, SITE) {
    const int lane = emulator::lane(), source = lane - int(distance);
    return exchange(HERE, mask, value, source >= (lane & ~(width - 1)) ? source : lane);
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32, SITE) {
    const int lane = emulator::lane(), source = lane + int(distance);
    return exchange(HERE, mask, value, source <= (lane | (width - 1)) ? source : lane);
}

[[noreturn]] inline void __trap(SITE) { emulator::trap(HERE); }

}  // namespace device

#undef SITE
#undef HERE
