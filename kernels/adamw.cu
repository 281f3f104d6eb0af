// AdamW with moments of 8 or 32 bits: bit-identical to src/optim/adamw8bit.rs and src/optim/adamw.rs. A warp
// has one block of 256 elements, a lane 8 consecutive ones: a lane's codes are 8 bytes, and the largest
// magnitudes go from lane to lane without shared memory. Per f32 element, 8-bit moments move 16 bytes, f32
// moments 28.
//
// A launch updates many tensors, which are listed in its argument: a graph that captured it keeps the list, and
// no memory has to outlive it.
#include "common.cuh"

constexpr int THREADS = 256;
constexpr int BLOCK = 256;
constexpr int EACH = BLOCK / WARP;
/// Elements of a block of threads. Every tensor begins with one.
constexpr int PER_BLOCK = THREADS * EACH;

/// Most tensors of a launch, and of one whose arguments may have 4 KB only: before CUDA 12.1.
constexpr int LARGE_TABLE = 472;
constexpr int SMALL_TABLE = 56;
/// Most rules of a launch.
constexpr int RULES = 8;

#ifdef SMALL_ARGUMENTS
constexpr int TENSORS = SMALL_TABLE;
#else
constexpr int TENSORS = LARGE_TABLE;
#endif

/// What is the same for all elements of a parameter; see `Rule` in src/optim/adamw.rs.
struct Rule {
    float beta1, beta2, eps, step_size, keep;
};

/// The tensors of a launch; see `Table` in src/torch/optim/adamw_cuda.rs. Addresses are numbers, as their types
/// differ between kernels.
struct Table {
    u64 value[TENSORS], grad[TENSORS], m[TENSORS], v[TENSORS], m_absmax[TENSORS], v_absmax[TENSORS];
    i64 first[TENSORS];  // index of the first element in its parameter
    u64 bad;             // counts gradients that are not finite
    u32 begin[TENSORS];  // the first block of threads
    u32 seed[TENSORS];   // of stochastic rounding, for bf16
    Rule rules[RULES];
    u32 count;               // of tensors
    u16 in_last[TENSORS];    // elements in the last block of threads
    u8 rule[TENSORS];        // index in `rules`
    u8 stochastic[TENSORS];  // 0: round to nearest
};
static_assert(sizeof(Table) <= (TENSORS == SMALL_TABLE ? 4096 : 32764), "a kernel cannot have larger arguments");

// ---- the 8-bit format, see src/optim/octave.rs ----

constexpr float SIGNED_TOP = 2068480.0f;  // 505 * 2^12
constexpr float ROOT_TOP = 16662528.0f;   // 1017 * 2^14
constexpr float LEAST = 1e-30f;
constexpr u32 SIGNED_ZERO = 128;
constexpr u32 SIGN = 0x80000000u;

__device__ __forceinline__ float inverse(float top, float absmax) {
    return absmax > LEAST ? __fdiv_rn(top, absmax) : 0.0f;
}

/// The code of the value nearest to `y >= 0`, as a float.
__device__ __forceinline__ float code_of(float y) {
    const u32 octave = (__float_as_uint(y) >> 23) - 127u;
    const u32 third = (octave * 171u) >> 9;
    const float power = __uint_as_float((third + 127u) << 23);
    const float inverse_square = __uint_as_float((127u - 2u * third) << 23);
    const float linear = fmaf(y, inverse_square, 6.0f * power) * (1.0f / 7.0f);
    return linear < y ? linear : y;
}

__device__ __forceinline__ u32 nearest(float q, u32 zero) {
    return __float_as_uint(q + (12582912.0f + static_cast<float>(zero))) & 0xffu;
}

__device__ __forceinline__ float value_of(float q) {
    const float power = __uint_as_float(__float_as_uint(q) & 0xff800000u);
    return fmaf(q, 7.0f, -6.0f * power) * (power * power);
}

__device__ __forceinline__ u32 signed_code(float x, float inverse) {
    const float q = code_of(fabsf(x) * inverse);
    return nearest(__uint_as_float(__float_as_uint(q) | (__float_as_uint(x) & SIGN)), SIGNED_ZERO);
}

__device__ __forceinline__ u32 root_code(float root, float inverse) {
    return nearest(code_of(root * inverse), 0);
}

__device__ __forceinline__ float signed_value(u32 code) {
    const float q = static_cast<float>(static_cast<int>(code) - static_cast<int>(SIGNED_ZERO));
    return value_of(q) * (1.0f / SIGNED_TOP);
}

__device__ __forceinline__ float root_value(u32 code) {
    return value_of(static_cast<float>(code)) * (1.0f / ROOT_TOP);
}

// ---- the rule ----

struct Element {
    float value, m, v, root;
    bool finite;
};

__device__ __forceinline__ Element updated(const Rule& rule, float value, float grad, float m, float v) {
    const float square = grad * grad;
    const bool finite = square < __uint_as_float(0x7f800000u);  // false for NaN
    m = finite ? fmaf(rule.beta1, m, (1.0f - rule.beta1) * grad) : 0.0f;
    v = finite ? fmaf(rule.beta2, v, (1.0f - rule.beta2) * square) : 0.0f;
    const float root = __fsqrt_rn(v);
    const float keep = finite ? rule.keep : 1.0f;
    value = fmaf(rule.step_size, __fdiv_rn(m, root + rule.eps), value) * keep;
    return Element{value, m, v, root, finite};
}

template <typename T>
constexpr bool IS_BF16 = false;
template <>
constexpr bool IS_BF16<bf16> = true;

/// Stochastic rounding to bf16: the upper neighbour with the probability that keeps the mean.
__device__ __forceinline__ float nudged(float x, u32 place, u32 seed) {
    u32 noise = place ^ seed;
    noise = (noise ^ (noise >> 16)) * 0x85ebca6bu;
    noise = (noise ^ (noise >> 13)) * 0xc2b2ae35u;
    noise = (noise ^ (noise >> 16)) & 0xffffu;
    const bool finite = fabsf(x) < __uint_as_float(0x7f800000u);
    return finite ? __uint_as_float((__float_as_uint(x) + noise) & 0xffff0000u) : x;
}

// ---- a lane's elements ----

/// In the last block some lanes have fewer than 8 elements; the rest is filled with values without effect.
template <typename T>
__device__ __forceinline__ void read(const T* source, int here, bool aligned, float (&values)[EACH]) {
    if (here == EACH && aligned) {
        constexpr int GROUP = LANES<T>;
        float group[GROUP];
#pragma unroll
        for (int part = 0; part < EACH / GROUP; ++part) {
            load_16_bytes(source + part * GROUP, group);
#pragma unroll
            for (int i = 0; i < GROUP; ++i) {
                values[part * GROUP + i] = group[i];
            }
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        values[i] = i < here ? to_float(source[i]) : 0.0f;
    }
}

template <typename T>
__device__ __forceinline__ void write(T* target, int here, bool aligned, const float (&values)[EACH]) {
    if (here == EACH && aligned) {
        constexpr int GROUP = LANES<T>;
        float group[GROUP];
#pragma unroll
        for (int part = 0; part < EACH / GROUP; ++part) {
#pragma unroll
            for (int i = 0; i < GROUP; ++i) {
                group[i] = values[part * GROUP + i];
            }
            store_16_bytes(target + part * GROUP, group);
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        if (i < here) {
            target[i] = from_float<T>(values[i]);
        }
    }
}

__device__ __forceinline__ void read_codes(
    const u8* source, int here, bool aligned, u32 behind, u32 (&codes)[EACH]
) {
    if (here == EACH && aligned) {
        const uint2 words = *reinterpret_cast<const uint2*>(source);
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            codes[i] = ((i < 4 ? words.x : words.y) >> (8 * (i % 4))) & 0xffu;
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        codes[i] = i < here ? source[i] : behind;
    }
}

__device__ __forceinline__ void write_codes(
    u8* target, int here, bool aligned, const u32 (&codes)[EACH]
) {
    if (here == EACH && aligned) {
        uint2 words = make_uint2(0, 0);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            words.x |= codes[i] << (8 * i);
            words.y |= codes[i + 4] << (8 * i);
        }
        *reinterpret_cast<uint2*>(target) = words;
        return;
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        if (i < here) {
            target[i] = static_cast<u8>(codes[i]);
        }
    }
}

/// The tensor of this block of threads: the last one that does not begin behind it.
__device__ __forceinline__ u32 tensor_of(const Table& table) {
    u32 low = 0, high = table.count;
    while (high - low > 1) {
        const u32 middle = (low + high) / 2;
        if (table.begin[middle] <= blockIdx.x) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

/// Which elements of a tensor a lane has: none if they are past the end. Then the whole warp may be so.
struct Place {
    i64 block, start;
    int here;
    bool warp_is_past;

    __device__ __forceinline__ Place(const Table& table, u32 tensor) {
        const u32 end = tensor + 1 < table.count ? table.begin[tensor + 1] : gridDim.x;
        const u32 number = blockIdx.x - table.begin[tensor];
        const int lane = static_cast<int>(threadIdx.x) * EACH;
        start = static_cast<i64>(number) * PER_BLOCK + lane;
        block = start / BLOCK;
        const int in_block = blockIdx.x + 1 == end ? static_cast<int>(table.in_last[tensor]) : PER_BLOCK;
        const int left = in_block - lane;
        here = left >= EACH ? EACH : left > 0 ? left : 0;
        warp_is_past = lane / BLOCK * BLOCK >= in_block;
    }
};

template <typename T>
__device__ __forceinline__ void finish(
    T* value, const Place& place, const Table& table, u32 tensor, float (&values)[EACH], int bad
) {
    if (IS_BF16<T> && table.stochastic[tensor] != 0) {
        const u64 from = static_cast<u64>(table.first[tensor]);
        const i64 in_parameter = place.start / BLOCK * BLOCK;
        const u64 begin = from + static_cast<u64>(in_parameter);
        const u32 start = static_cast<u32>(begin) ^ (static_cast<u32>(begin >> 32) * 0x9e3779b9u);
        const u32 in_block = static_cast<u32>(place.start - in_parameter);
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            values[i] = nudged(values[i], start + in_block + i, table.seed[tensor]);
        }
    }
    write(value + place.start, place.here, is_aligned_16(value), values);
    if (bad > 0) {
        atomicAdd(reinterpret_cast<u64*>(table.bad), static_cast<u64>(bad));
    }
}

template <typename T, typename G>
__device__ __forceinline__ void eight_bits(const Table& table) {
    const u32 tensor = tensor_of(table);
    const Place place(table, tensor);
    if (place.warp_is_past) {
        return;  // all lanes of the warp return together
    }
    const Rule rule = table.rules[table.rule[tensor]];
    T* const value = reinterpret_cast<T*>(table.value[tensor]);
    const G* const grad = reinterpret_cast<const G*>(table.grad[tensor]);
    u8* const m_codes = reinterpret_cast<u8*>(table.m[tensor]);
    u8* const v_codes = reinterpret_cast<u8*>(table.v[tensor]);
    float* const m_absmax = reinterpret_cast<float*>(table.m_absmax[tensor]);
    float* const v_absmax = reinterpret_cast<float*>(table.v_absmax[tensor]);
    float values[EACH], grads[EACH], m[EACH], roots[EACH];
    u32 m_code[EACH], v_code[EACH];
    const bool codes_aligned = ((reinterpret_cast<u64>(m_codes) | reinterpret_cast<u64>(v_codes)) & 7u) == 0;
    read_codes(m_codes + place.start, place.here, codes_aligned, SIGNED_ZERO, m_code);
    read_codes(v_codes + place.start, place.here, codes_aligned, 0, v_code);
    read(value + place.start, place.here, is_aligned_16(value), values);
    read(grad + place.start, place.here, is_aligned_16(grad), grads);
    const float m_scale = m_absmax[place.block];
    const float root_scale = __fsqrt_rn(v_absmax[place.block]);
    u32 m_top = 0, v_top = 0;
    int bad = 0;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const float root = root_value(v_code[i]) * root_scale;
        const Element after = updated(rule, values[i], grads[i], signed_value(m_code[i]) * m_scale, root * root);
        values[i] = after.value;
        m[i] = after.m;
        roots[i] = after.root;
        m_top = max(m_top, __float_as_uint(after.m) & ~SIGN);
        v_top = max(v_top, __float_as_uint(after.v));
        bad += after.finite ? 0 : 1;
    }
    const float m_largest = __uint_as_float(warp_max(m_top));
    const float v_largest = __uint_as_float(warp_max(v_top));
    if (threadIdx.x % WARP == 0) {
        m_absmax[place.block] = m_largest;
        v_absmax[place.block] = v_largest;
    }
    const float m_inverse = inverse(SIGNED_TOP, m_largest);
    const float root_inverse = inverse(ROOT_TOP, __fsqrt_rn(v_largest));
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        m_code[i] = signed_code(m[i], m_inverse);
        v_code[i] = root_code(roots[i], root_inverse);
    }
    write_codes(m_codes + place.start, place.here, codes_aligned, m_code);
    write_codes(v_codes + place.start, place.here, codes_aligned, v_code);
    finish(value, place, table, tensor, values, bad);
}

template <typename T, typename G>
__device__ __forceinline__ void full(const Table& table) {
    const u32 tensor = tensor_of(table);
    const Place place(table, tensor);
    if (place.here == 0) {
        return;
    }
    const Rule rule = table.rules[table.rule[tensor]];
    T* const value = reinterpret_cast<T*>(table.value[tensor]);
    const G* const grad = reinterpret_cast<const G*>(table.grad[tensor]);
    float* const m_values = reinterpret_cast<float*>(table.m[tensor]);
    float* const v_values = reinterpret_cast<float*>(table.v[tensor]);
    float values[EACH], grads[EACH], m[EACH], v[EACH];
    const bool moments_aligned = is_aligned_16(m_values) && is_aligned_16(v_values);
    read(value + place.start, place.here, is_aligned_16(value), values);
    read(grad + place.start, place.here, is_aligned_16(grad), grads);
    read(m_values + place.start, place.here, moments_aligned, m);
    read(v_values + place.start, place.here, moments_aligned, v);
    int bad = 0;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const Element after = updated(rule, values[i], grads[i], m[i], v[i]);
        values[i] = after.value;
        m[i] = after.m;
        v[i] = after.v;
        bad += after.finite ? 0 : 1;
    }
    write(m_values + place.start, place.here, moments_aligned, m);
    write(v_values + place.start, place.here, moments_aligned, v);
    finish(value, place, table, tensor, values, bad);
}

#define KERNELS(NAME, T, G)                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS) adamw8bit_##NAME(                               \
        const __grid_constant__ Table table                                                               \
    ) {                                                                                                   \
        eight_bits<T, G>(table);                                                                          \
    }                                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS) adamw_##NAME(                                   \
        const __grid_constant__ Table table                                                               \
    ) {                                                                                                   \
        full<T, G>(table);                                                                                \
    }

KERNELS(f32, float, float)
KERNELS(bf16, bf16, bf16)
KERNELS(f16, f16, f16)
// 16-bit values with f32 gradients.
KERNELS(bf16_f32, bf16, float)
KERNELS(f16_f32, f16, float)
