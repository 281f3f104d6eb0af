// What the kernels share: types, conversions, 16-byte accesses, reductions.
//
// Compiled by NVRTC (C++17, no system header) for the device, and by the host's compiler in the
// emulator of tests/cuda: inline PTX has a bit-identical host version beside it.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

constexpr int WARP = 32;
constexpr u32 ALL_LANES = 0xffffffffu;

/// The bits of a bfloat16.
struct bf16 {
    u16 bits;
};

/// The bits of an IEEE half.
struct f16 {
    u16 bits;
};

// ---- bfloat16 <-> float ----

__device__ __forceinline__ float to_float(bf16 value) {
    return __uint_as_float(static_cast<u32>(value.bits) << 16);
}

/// To nearest, ties to even. NaN keeps its sign and upper payload and becomes quiet, as in Rust's
/// `half`: adding the rounding bias to it could carry into infinity or zero.
__device__ __forceinline__ bf16 to_bf16(float value) {
    const u32 bits = __float_as_uint(value);
    const u32 rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return bf16{static_cast<u16>((nan ? bits | 0x00400000u : rounded) >> 16)};
}

// ---- half <-> float ----

/// Exact. NaN becomes 0x7fffffff, as the instruction does it.
__device__ __forceinline__ float to_float(f16 value) {
#ifdef __CUDA_ARCH__
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
#else
    const u32 sign = static_cast<u32>(value.bits & 0x8000u) << 16;
    const u32 magnitude = value.bits & 0x7fffu;
    if (magnitude > 0x7c00u) {
        return __uint_as_float(0x7fffffffu);
    }
    if (magnitude == 0x7c00u) {
        return __uint_as_float(sign | 0x7f800000u);
    }
    if (magnitude >= 0x0400u) {
        return __uint_as_float(sign | ((magnitude << 13) + (112u << 23)));
    }
    // Subnormal: an integer multiple of 2^-24, exact in float.
    const float steps = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    return __uint_as_float(sign | __float_as_uint(steps));
#endif
}

/// To nearest, ties to even; 65520 and above are infinity. NaN becomes 0x7fff, as in the instruction.
__device__ __forceinline__ f16 to_f16(float value) {
#ifdef __CUDA_ARCH__
    f16 result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
#else
    const u32 bits = __float_as_uint(value);
    const u32 sign = (bits >> 16) & 0x8000u;
    const u32 magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
        return f16{0x7fff};
    }
    if (magnitude >= 0x47800000u) {  // 2^16
        return f16{static_cast<u16>(sign | 0x7c00u)};
    }
    if (magnitude < 0x38800000u) {  // 2^-14: in steps of 2^-24, rounded by adding 2^-1 at that scale
        const float shifted = __fadd_rn(__uint_as_float(magnitude), 0.5f);
        return f16{static_cast<u16>(sign | (__float_as_uint(shifted) - 0x3f000000u))};
    }
    // Rounding may carry into the exponent, up to infinity, which is correct.
    const u32 rounded = magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u);
    return f16{static_cast<u16>(sign | (rounded >> 13))};
#endif
}

// ---- for templates over the element type ----

__device__ __forceinline__ float to_float(float value) {
    return value;
}

template <typename T>
__device__ __forceinline__ T from_float(float value);

template <>
__device__ __forceinline__ float from_float<float>(float value) {
    return value;
}

template <>
__device__ __forceinline__ bf16 from_float<bf16>(float value) {
    return to_bf16(value);
}

template <>
__device__ __forceinline__ f16 from_float<f16>(float value) {
    return to_f16(value);
}

template <typename T>
__device__ __forceinline__ float load(const T* source, i64 index) {
    return to_float(source[index]);
}

template <typename T>
__device__ __forceinline__ void store(T* target, i64 index, float value) {
    target[index] = from_float<T>(value);
}

/// Two 16-bit elements in a 32-bit word, the first in the low half, each rounded to nearest, ties to even.
/// NaN becomes 0x7fff. One instruction from sm_80 on; rounding a single bfloat16 takes seven.
template <typename T>
__device__ __forceinline__ u32 pack(float low, float high);

template <>
__device__ __forceinline__ u32 pack<bf16>(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    u32 word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
#else
    const u32 first = low == low ? to_bf16(low).bits : 0x7fffu;
    const u32 second = high == high ? to_bf16(high).bits : 0x7fffu;
    return first | second << 16;
#endif
}

template <>
__device__ __forceinline__ u32 pack<f16>(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    u32 word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
#else
    return static_cast<u32>(to_f16(low).bits) | static_cast<u32>(to_f16(high).bits) << 16;
#endif
}

// ---- 16 bytes at once ----

/// How many elements of `T` are in 16 bytes: 4 floats, 8 halves.
template <typename T>
constexpr int LANES = 16 / static_cast<int>(sizeof(T));

__device__ __forceinline__ bool is_aligned_16(const void* address) {
    return (reinterpret_cast<u64>(address) & 15u) == 0;
}

/// Reads `LANES<T>` elements; `source` is aligned to 16 bytes.
__device__ __forceinline__ void load_16_bytes(const float* source, float (&values)[4]) {
    const float4 words = *reinterpret_cast<const float4*>(source);
    values[0] = words.x;
    values[1] = words.y;
    values[2] = words.z;
    values[3] = words.w;
}

template <typename T>
__device__ __forceinline__ void load_16_bytes(const T* source, float (&values)[8]) {
    static_assert(sizeof(T) == 2, "8 elements are 16 bytes");
    const uint4 loaded = *reinterpret_cast<const uint4*>(source);
    const u32 words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        values[2 * i] = to_float(T{static_cast<u16>(words[i])});
        values[2 * i + 1] = to_float(T{static_cast<u16>(words[i] >> 16)});
    }
}

/// Writes `LANES<T>` elements, rounded once; `target` is aligned to 16 bytes.
__device__ __forceinline__ void store_16_bytes(float* target, const float (&values)[4]) {
    *reinterpret_cast<float4*>(target) = make_float4(values[0], values[1], values[2], values[3]);
}

template <typename T>
__device__ __forceinline__ void store_16_bytes(T* target, const float (&values)[8]) {
    static_assert(sizeof(T) == 2, "8 elements are 16 bytes");
    u32 words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        words[i] = pack<T>(values[2 * i], values[2 * i + 1]);
    }
    *reinterpret_cast<uint4*>(target) = make_uint4(words[0], words[1], words[2], words[3]);
}

// ---- reductions: every thread gets the result ----

struct Max {
    static __device__ __forceinline__ float identity() { return __uint_as_float(0xff800000u); }
    /// NaN loses against a number, as in `fmaxf`.
    static __device__ __forceinline__ float of(float a, float b) { return fmaxf(a, b); }
};

struct Sum {
    static __device__ __forceinline__ float identity() { return 0.0f; }
    static __device__ __forceinline__ float of(float a, float b) { return __fadd_rn(a, b); }
};

/// Over all lanes of a warp, as a butterfly: 16, 8, 4, 2, 1. This fixes the order of a sum, and since `a + b
/// == b + a` bit for bit, all lanes get the same bits.
template <typename Op>
__device__ __forceinline__ float warp_reduce(float value) {
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
        value = Op::of(value, __shfl_xor_sync(ALL_LANES, value, distance));
    }
    return value;
}

/// Over a one-dimensional block of full warps: each warp, then the warps' results by a butterfly.
/// All threads of the block must call this. Two barriers: the second lets the next call reuse the shared
/// memory.
template <typename Op>
__device__ __forceinline__ float block_reduce(float value) {
    __shared__ float partial[WARP];
    const int lane = static_cast<int>(threadIdx.x) % WARP;
    const int warp = static_cast<int>(threadIdx.x) / WARP;
    value = warp_reduce<Op>(value);
    if (lane == 0) {
        partial[warp] = value;
    }
    __syncthreads();
    value = lane < static_cast<int>(blockDim.x) / WARP ? partial[lane] : Op::identity();
    value = warp_reduce<Op>(value);
    __syncthreads();
    return value;
}

__device__ __forceinline__ float warp_max(float value) {
    return warp_reduce<Max>(value);
}

/// Maximum of the bits of non-negative floats; NaN is above every number.
__device__ __forceinline__ u32 warp_max(u32 bits) {
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
        bits = max(bits, __shfl_xor_sync(ALL_LANES, bits, distance));
    }
    return bits;
}

__device__ __forceinline__ float warp_sum(float value) {
    return warp_reduce<Sum>(value);
}

__device__ __forceinline__ float block_max(float value) {
    return block_reduce<Max>(value);
}

__device__ __forceinline__ float block_sum(float value) {
    return block_reduce<Sum>(value);
}
