// NF4 (Dettmers et al. 2023, arXiv 2305.14314): quantise, dequantise, multiply by a few tokens.
//
// The same operations as src/quant/nf4.rs and src/quant/product.rs; quantise and dequantise are
// bit-identical.
#include "common.cuh"

/// Bits of the 16 values; a test compares them with src/quant/codebook.rs.
__constant__ u32 NF4[16] = {
    0xbf800000u, 0xbf3239b1u, 0xbf066b30u, 0xbeca32a0u, 0xbe91a24du, 0xbe3d353fu, 0xbdba7871u, 0x00000000u,
    0x3da2faffu, 0x3e24cae3u, 0x3e7c04ddu, 0x3ead033au, 0x3ee1a4b8u, 0x3f1007abu, 0x3f3913b3u, 0x3f800000u,
};

/// Bits of the midpoints between the values.
__constant__ u32 MIDPOINTS[15] = {
    0xbf591cd8u, 0xbf1c5270u, 0xbeeb8480u, 0xbeadea76u, 0xbe703cecu, 0xbe0d38bcu, 0xbd3a7871u, 0x3d22faffu,
    0x3df64862u, 0x3e5067e0u, 0x3e9582d4u, 0x3ec753f9u, 0x3f006d04u, 0x3f248dafu, 0x3f5c89dau,
};

/// The scales of the blocks, plain or themselves quantised.
struct Scales {
    /// `float`, one per block; with a map, `u8` codes.
    const void* absmax;
    /// 256 values, or null.
    const float* map;
    /// One for every `2^nested_shift` scales.
    const float* nested_absmax;
    /// One number.
    const float* offset;
    int nested_shift;

    /// The scales of several blocks, without a branch between them, so that their loads overlap.
    template <int N>
    __device__ __forceinline__ void get(const i64 (&blocks)[N], float (&scales)[N]) const {
        if (map == nullptr) {
#pragma unroll
            for (int i = 0; i < N; ++i) {
                scales[i] = static_cast<const float*>(absmax)[blocks[i]];
            }
            return;
        }
        u32 codes[N];
        float groups[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            codes[i] = static_cast<const u8*>(absmax)[blocks[i]];
            groups[i] = nested_absmax[blocks[i] >> nested_shift];
        }
        const float mean = *offset;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            scales[i] = __fadd_rn(__fmul_rn(map[codes[i]], groups[i]), mean);
        }
    }

    __device__ __forceinline__ float get(i64 block) const {
        const i64 blocks[1] = {block};
        float scales[1];
        get(blocks, scales);
        return scales[0];
    }
};

// ---- quantise: one warp per block ----

constexpr int QUANTIZE_THREADS = 256;

/// The nearest code; 15 for NaN.
__device__ __forceinline__ u32 nearest(float x) {
    u32 code = 0;
#pragma unroll
    for (int i = 0; i < 15; ++i) {
        code += !(x <= __uint_as_float(MIDPOINTS[i]));
    }
    return code;
}

template <typename T>
__device__ __forceinline__ void quantize(
    const T* __restrict__ values, u8* __restrict__ packed, float* __restrict__ absmax, i64 count, int blocksize
) {
    constexpr float LEAST = 1e-38f;
    const i64 block = (static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x) / WARP;
    const int lane = static_cast<int>(threadIdx.x) % WARP;
    const i64 first = block * blocksize;
    if (first >= count) {
        return;
    }
    const bool whole = count - first >= blocksize;
    const int len = whole ? blocksize : static_cast<int>(count - first);
    u32 bits = 0;
    for (int i = lane; i < len; i += WARP) {
        // Compared as integers, so that NaN is above every number.
        bits = max(bits, __float_as_uint(load(values, first + i)) & 0x7fffffffu);
    }
    const float largest = __uint_as_float(warp_max(bits));
    const float scale = largest < LEAST ? LEAST : largest;
    const float inverse = __fdiv_rn(1.0f, scale);
    if (lane == 0) {
        absmax[block] = whole ? largest : scale;
    }
    for (int i = 2 * lane; i < len; i += 2 * WARP) {
        u32 codes[2] = {7, 7};  // padding of an odd number of values: the code of zero
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            if (i + j < len) {
                const float x = load(values, first + i + j);
                codes[j] = nearest(whole ? __fmul_rn(x, inverse) : __fdiv_rn(x, scale));
            }
        }
        packed[(first + i) / 2] = static_cast<u8>(codes[0] << 4 | codes[1]);
    }
}

// ---- dequantise: 16 bytes of values per thread, four times ----

constexpr int DEQUANTIZE_THREADS = 256;
constexpr int DEQUANTIZE_STEPS = 4;

/// The code values in shared memory: 16 words are in 16 banks, so look-ups have no bank conflicts.
__device__ __forceinline__ void fill(float (&code)[16]) {
    if (threadIdx.x < 16) {
        code[threadIdx.x] = __uint_as_float(NF4[threadIdx.x]);
    }
    __syncthreads();
}

/// The value at `i` of a word of codes: the first of two is in the high half of a byte.
__device__ __forceinline__ float value_of(const float (&code)[16], u32 word, int i) {
    return code[word >> (4 * (i ^ 1)) & 15u];
}

/// Loads words of 2 or 4 bytes of codes from any address.
template <int BYTES, int N>
__device__ __forceinline__ void load_codes(const u8* packed, const i64 (&places)[N], u32 (&words)[N]) {
    const bool aligned = reinterpret_cast<u64>(packed) % BYTES == 0;
    if (aligned) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            if constexpr (BYTES == 4) {
                words[i] = reinterpret_cast<const u32*>(packed)[places[i]];
            } else {
                words[i] = reinterpret_cast<const u16*>(packed)[places[i]];
            }
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
        words[i] = 0;
#pragma unroll
        for (int j = 0; j < BYTES; ++j) {
            words[i] |= static_cast<u32>(packed[places[i] * BYTES + j]) << (8 * j);
        }
    }
}

template <typename T>
__device__ __forceinline__ void dequantize(
    const u8* __restrict__ packed, const Scales scales, T* __restrict__ values, i64 count, int block_shift
) {
    constexpr int GROUP = LANES<T>;
    constexpr int BYTES = GROUP / 2;
    __shared__ float code[16];
    const i64 whole = count / GROUP;
    const i64 first = static_cast<i64>(blockIdx.x) * DEQUANTIZE_THREADS * DEQUANTIZE_STEPS + threadIdx.x;
    i64 groups[DEQUANTIZE_STEPS];
    u32 words[DEQUANTIZE_STEPS];
    float scale[DEQUANTIZE_STEPS];
    if (whole > 0) {
        i64 blocks[DEQUANTIZE_STEPS];
#pragma unroll
        for (int step = 0; step < DEQUANTIZE_STEPS; ++step) {
            // Past the end, the last group is read again but not written.
            groups[step] = min(first + step * DEQUANTIZE_THREADS, whole - 1);
            blocks[step] = groups[step] * GROUP >> block_shift;
        }
        load_codes<BYTES>(packed, groups, words);
        scales.get(blocks, scale);
    }
    fill(code);  // overlaps with the loads
#pragma unroll
    for (int step = 0; step < DEQUANTIZE_STEPS; ++step) {
        if (first + step * DEQUANTIZE_THREADS < whole) {
            float wide[GROUP];
#pragma unroll
            for (int i = 0; i < GROUP; ++i) {
                wide[i] = __fmul_rn(value_of(code, words[step], i), scale[step]);
            }
            store_16_bytes(values + groups[step] * GROUP, wide);
        }
    }
    // The remainder is smaller than a group: one thread per value, in the first block.
    const i64 last = whole * GROUP + threadIdx.x;
    if (blockIdx.x == 0 && last < count) {
        const float value = value_of(code, packed[last / 2], static_cast<int>(last & 1));
        store(values, last, __fmul_rn(value, scales.get(last >> block_shift)));
    }
}

// ---- multiply: one warp per two rows of the weight ----

constexpr int MULTIPLY_THREADS = 128;
/// Rows of a warp share the loads of the tokens.
constexpr int ROWS = 2;
/// Codes in a 32-bit word; they are in one block.
constexpr int CODES = 8;

template <typename T>
__device__ __forceinline__ void load_tokens(const T* x, float (&values)[CODES]) {
    if constexpr (LANES<T> == CODES) {
        load_16_bytes(x, values);
    } else {
        float half[2][LANES<T>];
        load_16_bytes(x, half[0]);
        load_16_bytes(x + LANES<T>, half[1]);
#pragma unroll
        for (int i = 0; i < CODES; ++i) {
            values[i] = half[i / LANES<T>][i % LANES<T>];
        }
    }
}

/// `out[t, row] = sum over c of x[t, c] * weight[row, c] + bias[row]`, in `float`, rounded once. `columns`
/// is a multiple of 8, `x` aligned to 16 bytes, `packed` to 4; `tokens` is at most TOKENS.
template <typename T, int TOKENS>
__device__ __forceinline__ void multiply(
    const T* __restrict__ x, const u8* __restrict__ packed, const Scales scales, const T* __restrict__ bias,
    T* __restrict__ out, int tokens, int rows, int columns, int block_shift
) {
    __shared__ float code[16];
    fill(code);
    const int lane = static_cast<int>(threadIdx.x) % WARP;
    const i64 row = (static_cast<i64>(blockIdx.x) * MULTIPLY_THREADS + threadIdx.x) / WARP * ROWS;
    if (row >= rows) {
        return;
    }
    // Steps whose loads overlap: as many as fit in registers beside the sums.
    constexpr int STEPS = TOKENS == 1 ? 4 : TOKENS <= 4 ? 2 : 1;
    constexpr int WIDTH = WARP * CODES;
    float sums[ROWS][TOKENS] = {};
    for (int first = lane * CODES; first < columns; first += STEPS * WIDTH) {
        i64 blocks[STEPS * ROWS];
        u32 words[STEPS * ROWS];
        float scale[STEPS * ROWS];
#pragma unroll
        for (int i = 0; i < STEPS * ROWS; ++i) {
            // Past the end of a row its beginning is read, and for a missing second row the first; neither is
            // added to the sums.
            const int column = first + i / ROWS * WIDTH;
            const i64 start = (row + i % ROWS < rows ? row + i % ROWS : row) * columns;
            const i64 place = start + (column < columns ? column : first);
            words[i] = reinterpret_cast<const u32*>(packed)[place / CODES];
            blocks[i] = place >> block_shift;
        }
        scales.get(blocks, scale);
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            const bool inside = first + step * WIDTH < columns;
            const int column = inside ? first + step * WIDTH : first;
            float weights[ROWS][CODES];
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
#pragma unroll
                for (int i = 0; i < CODES; ++i) {
                    weights[r][i] = value_of(code, words[step * ROWS + r], i);
                }
            }
#pragma unroll
            for (int t = 0; t < TOKENS; ++t) {
                float values[CODES];
                load_tokens(x + static_cast<i64>(t < tokens ? t : 0) * columns + column, values);
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    float part = 0.0f;
#pragma unroll
                    for (int i = 0; i < CODES; ++i) {
                        part = fmaf(weights[r][i], values[i], part);
                    }
                    const float sum = fmaf(part, scale[step * ROWS + r], sums[r][t]);
                    sums[r][t] = inside ? sum : sums[r][t];
                }
            }
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            const float sum = warp_sum(sums[r][t]);
            if (lane == 0 && row + r < rows && t < tokens) {
                const float shift = bias == nullptr ? 0.0f : load(bias, row + r);
                store(out, t * static_cast<i64>(rows) + row + r, __fadd_rn(sum, shift));
            }
        }
    }
}

// ---- kernels ----

#define SCALES                                                                                          \
    const void *absmax, const float *map, const float *nested_absmax, const float *offset, int nested_shift
#define SCALES_OF_ARGUMENTS \
    Scales { absmax, map, nested_absmax, offset, nested_shift }

#define QUANTIZE(NAME, T)                                                                               \
    extern "C" __global__ void __launch_bounds__(QUANTIZE_THREADS)                                      \
        nf4_quantize_##NAME(const T* values, u8* packed, float* absmax, i64 count, int blocksize) {     \
        quantize<T>(values, packed, absmax, count, blocksize);                                          \
    }

#define DEQUANTIZE(NAME, T)                                                                             \
    extern "C" __global__ void __launch_bounds__(DEQUANTIZE_THREADS)                                    \
        nf4_dequantize_##NAME(const u8* packed, SCALES, T* values, i64 count, int block_shift) {        \
        dequantize<T>(packed, SCALES_OF_ARGUMENTS, values, count, block_shift);                         \
    }

#define MULTIPLY(TOKENS, NAME, T)                                                                       \
    extern "C" __global__ void __launch_bounds__(MULTIPLY_THREADS, 4) nf4_multiply##TOKENS##_##NAME(       \
        const T* x, const u8* packed, SCALES, const T* bias, T* out, int tokens, int rows, int columns, \
        int block_shift                                                                                 \
    ) {                                                                                                 \
        multiply<T, TOKENS>(                                                                            \
            x, packed, SCALES_OF_ARGUMENTS, bias, out, tokens, rows, columns, block_shift               \
        );                                                                                              \
    }

QUANTIZE(f32, float)
QUANTIZE(bf16, bf16)
QUANTIZE(f16, f16)

DEQUANTIZE(f32, float)
DEQUANTIZE(bf16, bf16)
DEQUANTIZE(f16, f16)

MULTIPLY(1, f32, float)
MULTIPLY(1, bf16, bf16)
MULTIPLY(1, f16, f16)
MULTIPLY(4, f32, float)
MULTIPLY(4, bf16, bf16)
MULTIPLY(4, f16, f16)
MULTIPLY(8, f32, float)
MULTIPLY(8, bf16, bf16)
MULTIPLY(8, f16, f16)
