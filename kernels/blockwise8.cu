// 8-bit blockwise quantisation with a map of 256 ascending values (Dettmers et al. 2022,
// arXiv 2110.02861). Bit-identical to src/quant/blockwise8.rs with the nearest code.
#include "common.cuh"

constexpr int MAP_LEN = 256;
constexpr int THREADS = 256;

/// The largest `float` that is not above `x`.
__device__ __forceinline__ float round_down(double x) {
    const float nearest = static_cast<float>(x);
    if (static_cast<double>(nearest) <= x) {
        return nearest;
    }
    const u32 bits = __float_as_uint(nearest);
    if ((bits & 0x7fffffffu) == 0) {
        return __uint_as_float(0x80000001u);
    }
    return __uint_as_float(nearest > 0.0f ? bits - 1 : bits + 1);
}

/// Number of midpoints below `x`; zero for NaN.
__device__ __forceinline__ u32 code_of(const float (&midpoints)[MAP_LEN], float x) {
    u32 code = 0;
#pragma unroll
    for (u32 step = MAP_LEN / 2; step > 0; step /= 2) {
        code += x > midpoints[code + step - 1] ? step : 0;
    }
    return code;
}

/// One warp per block of values.
template <typename T>
__device__ __forceinline__ void quantize(
    const T* __restrict__ values, const float* __restrict__ map, u8* __restrict__ codes,
    float* __restrict__ absmax, i64 count, i64 blocksize
) {
    // A `float` is above an exact midpoint if it is above the midpoint rounded down, so the search needs no
    // doubles, which are slow on some GPUs.
    __shared__ float midpoints[MAP_LEN];
    for (int i = static_cast<int>(threadIdx.x); i < MAP_LEN - 1; i += THREADS) {
        const double sum = static_cast<double>(map[i]) + static_cast<double>(map[i + 1]);
        midpoints[i] = round_down(sum * 0.5);
    }
    __syncthreads();
    const i64 block = (static_cast<i64>(blockIdx.x) * THREADS + threadIdx.x) / WARP;
    const int lane = static_cast<int>(threadIdx.x) % WARP;
    const i64 first = block * blocksize;
    if (first >= count) {
        return;
    }
    const i64 end = count - first < blocksize ? count : first + blocksize;
    u32 bits = 0;
    for (i64 i = first + lane; i < end; i += WARP) {
        // Compared as integers, so that NaN is above every number.
        bits = max(bits, __float_as_uint(load(values, i)) & 0x7fffffffu);
    }
    const float largest = __uint_as_float(warp_max(bits));
    if (lane == 0) {
        absmax[block] = largest;
    }
    // The inverse of a subnormal overflows.
    const float divisor = largest == 0.0f ? 1.0f : largest;
    for (i64 i = first + lane; i < end; i += WARP) {
        codes[i] = static_cast<u8>(code_of(midpoints, __fdiv_rn(load(values, i), divisor)));
    }
}

/// 16 bytes of values per thread, if the block size is a multiple of that.
template <typename T>
__device__ __forceinline__ void dequantize(
    const u8* __restrict__ codes, const float* __restrict__ map, const float* __restrict__ absmax,
    T* __restrict__ values, i64 count, i64 blocksize
) {
    __shared__ float table[MAP_LEN];
    for (int i = static_cast<int>(threadIdx.x); i < MAP_LEN; i += THREADS) {
        table[i] = map[i];
    }
    __syncthreads();
    constexpr int GROUP = LANES<T>;
    const i64 start = (static_cast<i64>(blockIdx.x) * THREADS + threadIdx.x) * GROUP;
    if (start >= count) {
        return;
    }
    const bool together = count - start >= GROUP && blocksize % GROUP == 0;
    if (!together) {
        const i64 end = count - start < GROUP ? count : start + GROUP;
        for (i64 i = start; i < end; ++i) {
            store(values, i, __fmul_rn(table[codes[i]], absmax[i / blocksize]));
        }
        return;
    }
    const float scale = absmax[start / blocksize];
    float wide[GROUP];
#pragma unroll
    for (int i = 0; i < GROUP; ++i) {
        wide[i] = __fmul_rn(table[codes[start + i]], scale);
    }
    store_16_bytes(values + start, wide);
}

#define KERNELS(NAME, T)                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS) blockwise8_quantize_##NAME(               \
        const T* values, const float* map, u8* codes, float* absmax, i64 count, i64 blocksize       \
    ) {                                                                                             \
        quantize<T>(values, map, codes, absmax, count, blocksize);                                  \
    }                                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS) blockwise8_dequantize_##NAME(             \
        const u8* codes, const float* map, const float* absmax, T* values, i64 count, i64 blocksize \
    ) {                                                                                             \
        dequantize<T>(codes, map, absmax, values, count, blocksize);                                \
    }

KERNELS(f32, float)
KERNELS(bf16, bf16)
KERNELS(f16, f16)
