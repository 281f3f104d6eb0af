// The ORPO head around the tiles of head_tiles.cu: sorts out which rows of a batch are scored, then turns
// their statistics into the loss and the coefficient of each row's gradient. One block does a batch, so that
// the host does not wait. The references are src/head/layout.rs, src/head/scores.rs and
// src/head/odds_ratio.rs.
#include "common.cuh"

constexpr int BLOCK = 512;

/// Indices into the counts of a batch.
enum Count { SCORED, NLL_TOKENS, CHOSEN_ROWS, REJECTED_ROWS, INVALID, COMPLETIONS };
/// Counts before those of sequences.
constexpr int COUNTS = 5;
static_assert(COMPLETIONS == COUNTS, "the host makes room for so many");

/// Sorts the rows of a batch by their part in the loss. One block of BLOCK threads.
///
/// `index`: the scored rows in the batch's order, then the others in reverse. `owners`, in the order of
/// `index`: the sequence of a completion token or of an unscored row, -1 for a chosen prompt token. `counts`:
/// as in Count, then the completion tokens of each of `2 * pairs` sequences.
extern "C" __global__ void __launch_bounds__(BLOCK) head_layout(
    const i64* targets, const i64* sequence, const u8* completion, int rows, int pairs, i64 vocab,
    int full, i64* index, int* owners, int* counts) {
    __shared__ int before_warp[BLOCK / WARP];
    __shared__ int in_block;
    const int lane = static_cast<int>(threadIdx.x) % WARP;
    const int warp = static_cast<int>(threadIdx.x) / WARP;
    for (int i = threadIdx.x; i < COMPLETIONS + 2 * pairs; i += BLOCK) {
        counts[i] = 0;
    }
    __syncthreads();
    int before = 0;
    for (int start = 0; start < rows; start += BLOCK) {
        const int row = start + static_cast<int>(threadIdx.x);
        const bool exists = row < rows;
        const i64 target = exists ? targets[row] : -100;
        const i64 place = exists ? sequence[row] : 0;
        const bool valid = place >= 0 && place < 2 * pairs && target < vocab
            && (target >= 0 || target == -100);
        const bool rejected = place >= pairs;
        const bool answer = exists && completion[row] != 0;
        const bool scored = exists && valid && target >= 0 && (answer || (!rejected && full));

        const u32 votes = __ballot_sync(ALL_LANES, scored);
        if (lane == 0) {
            before_warp[warp] = __popc(votes);
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            int sum = 0;
            for (int i = 0; i < BLOCK / WARP; ++i) {
                const int own = before_warp[i];
                before_warp[i] = sum;
                sum += own;
            }
            in_block = sum;
        }
        __syncthreads();
        const int rank = before + before_warp[warp] + __popc(votes & ((1u << lane) - 1u));
        before += in_block;
        if (exists) {
            const int slot = scored ? rank : rows - 1 - (row - rank);
            index[slot] = row;
            owners[slot] = scored && !answer ? -1 : static_cast<int>(place);
            atomicAdd(counts + (rejected ? REJECTED_ROWS : CHOSEN_ROWS), 1);
            if (!valid) {
                atomicAdd(counts + INVALID, 1);
            }
            if (scored && !rejected) {
                atomicAdd(counts + NLL_TOKENS, 1);
            }
            if (scored && answer) {
                atomicAdd(counts + COMPLETIONS + place, 1);
            }
        }
        __syncthreads();  // before_warp and in_block are written again
    }
    if (threadIdx.x == 0) {
        counts[SCORED] = before;
    }
}

/// The mean hidden state of each side, `[2, width]`, and for 16-bit types what rounding lost, `[2, width]`
/// more: since logits are linear, their sums are those of the side's logits over its rows. One block of BLOCK
/// threads per WARP columns.
template <typename T>
__device__ __forceinline__ void side_means(
    const T* hidden, i64 width, const i64* sequence, int rows, int pairs, const int* counts, T* means) {
    constexpr int DEPTH = BLOCK / WARP;
    __shared__ float partial[2][DEPTH][WARP];
    const int lane = static_cast<int>(threadIdx.x) % WARP;
    const int depth = static_cast<int>(threadIdx.x) / WARP;
    const i64 column = static_cast<i64>(blockIdx.x) * WARP + lane;
    float chosen = 0.0f;
    float rejected = 0.0f;
    if (column < width) {
#pragma unroll 4
        for (int row = depth; row < rows; row += DEPTH) {
            const float value = load(hidden, row * width + column);
            const bool right = sequence[row] >= pairs;
            chosen += right ? 0.0f : value;
            rejected += right ? value : 0.0f;
        }
    }
    partial[0][depth][lane] = chosen;
    partial[1][depth][lane] = rejected;
    __syncthreads();
    if (depth < 2 && column < width) {
        float sum = 0.0f;
        for (int i = 0; i < DEPTH; ++i) {
            sum += partial[depth][i][lane];
        }
        const int count = counts[CHOSEN_ROWS + depth];
        const float mean = count == 0 ? 0.0f : sum / static_cast<float>(count);
        const T rounded = from_float<T>(mean);
        means[depth * width + column] = rounded;
        if (sizeof(T) == 2) {
            store(means, (2 + depth) * width + column, mean - to_float(rounded));
        }
    }
}

#define SIDE_MEANS(name, T) \
    extern "C" __global__ void __launch_bounds__(BLOCK) name( \
        const T* hidden, i64 width, const i64* sequence, int rows, int pairs, const int* counts, \
        T* means) { \
        side_means<T>(hidden, width, sequence, rows, pairs, counts, means); \
    }
SIDE_MEANS(head_side_means_f32, float)
SIDE_MEANS(head_side_means_bf16, bf16)
SIDE_MEANS(head_side_means_f16, f16)

// ---- the loss, in double: src/head/odds_ratio.rs and src/head/scores.rs ----

constexpr double SMALLEST = 1.401298464324817e-45;
constexpr double STEEPEST = 16777216.0;
constexpr double LN_2 = 0.69314718055994530942;

/// `log(1 - exp(x))`.
__device__ double log1mexp(double x) {
    return x < -LN_2 ? log1p(-exp(x)) : log(-expm1(x));
}

/// The odds-ratio term of a pair: `odds_ratio::pair`.
struct Pair {
    double log_odds, log_sigmoid, value, d_chosen, d_rejected;
};

__device__ double steepness(double slope, double x) {
    const double d = slope / -expm1(x);
    return d > STEEPEST ? STEEPEST : d;
}

__device__ Pair odds_ratio(double chosen, double rejected, int identity) {
    chosen = chosen > -SMALLEST ? -SMALLEST : chosen;
    rejected = rejected > -SMALLEST ? -SMALLEST : rejected;
    const double x = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected));
    const double e = exp(-fabs(x));
    const double log_sigmoid = (x < 0.0 ? x : 0.0) - log1p(e);
    const double slope = identity ? 1.0 : (x > 0.0 ? e : 1.0) / (1.0 + e);
    return {x, log_sigmoid, identity ? x : log_sigmoid, steepness(slope, chosen), -steepness(slope, rejected)};
}

__device__ double warp_sum(double value) {
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
        value += __shfl_xor_sync(ALL_LANES, value, distance);
    }
    return value;
}

/// Sum over a block of BLOCK threads, in a fixed order; every thread gets the result.
__device__ double block_sum(double value) {
    __shared__ double partial[BLOCK / WARP];
    value = warp_sum(value);
    if (threadIdx.x % WARP == 0) {
        partial[threadIdx.x / WARP] = value;
    }
    __syncthreads();
    value = 0.0;
    for (int i = 0; i < BLOCK / WARP; ++i) {
        value += partial[i];
    }
    __syncthreads();
    return value;
}

/// Turns the statistics of the rows into the loss, its parts and the coefficient of every scored row. One
/// block of BLOCK threads.
///
/// Statistics are in the order of `index`: `scored` rows, then under a softcap the other rows, and
/// without one the means of the sides. `scratch` has room for `scored + 4 * pairs` numbers. Wrong arguments
/// make the loss and the coefficients NaN: a wrong number of scored rows, or tokens and sequences that do not
/// exist.
extern "C" __global__ void __launch_bounds__(BLOCK) head_scores(
    const float* max, const double* sum, const float* label, const double* total,
    const int* owners, const int* counts, int rows, int scored, int pairs, i64 vocab, double beta,
    int identity, int capped, int parts, const float* bias_sum, double* scratch, float* coefficients,
    float* loss, float* nll, float* chosen, float* rejected, float* log_odds, float* log_sigmoid,
    float* chosen_logits, float* rejected_logits, i64* empty) {
    double* logps = scratch;
    double* means = logps + scored;
    double* slopes = means + 2 * pairs;
    const int* completions = counts + COMPLETIONS;
    const int thread = static_cast<int>(threadIdx.x);
    const int nll_tokens = counts[NLL_TOKENS] > 0 ? counts[NLL_TOKENS] : 1;
    const double poison = counts[SCORED] == scored && counts[INVALID] == 0
        ? 0.0 : __longlong_as_double(0x7ff8000000000000ll);

    double nll_sum = 0.0;
    for (int i = thread; i < scored; i += BLOCK) {
        const double logp = (static_cast<double>(label[i]) - max[i]) - log(sum[i]);
        logps[i] = logp;
        nll_sum += owners[i] < pairs ? logp : 0.0;
    }
    nll_sum = -block_sum(nll_sum) / nll_tokens + poison;
    for (int s = thread / WARP; s < 2 * pairs; s += BLOCK / WARP) {
        double answer = 0.0;
        for (int i = thread % WARP; i < scored; i += WARP) {
            if (owners[i] == s) {
                answer += logps[i];
            }
        }
        answer = warp_sum(answer);
        if (thread % WARP == 0) {
            means[s] = completions[s] == 0 ? 0.0 : answer / completions[s];
        }
    }
    __syncthreads();

    double values = 0.0;
    double missing = 0.0;
    for (int pair = thread; pair < pairs; pair += BLOCK) {
        const double c = means[pair];
        const double r = means[pairs + pair];
        const bool whole = completions[pair] > 0 && completions[pairs + pair] > 0;
        const Pair term = whole ? odds_ratio(c, r, identity) : Pair{0.0, 0.0, 0.0, 0.0, 0.0};
        chosen[pair] = static_cast<float>(c);
        rejected[pair] = static_cast<float>(r);
        log_odds[pair] = static_cast<float>(term.log_odds);
        log_sigmoid[pair] = static_cast<float>(term.log_sigmoid);
        slopes[pair] = term.d_chosen;
        slopes[pairs + pair] = term.d_rejected;
        values += term.value;
        missing += whole ? 0.0 : 1.0;
    }
    values = block_sum(values);  // also a barrier: the slopes are written
    missing = block_sum(missing);

    const double weight = beta / (pairs > 0 ? pairs : 1);
    for (int i = thread; i < scored; i += BLOCK) {
        const int s = owners[i];
        double a = s < pairs ? 1.0 / nll_tokens : 0.0;
        if (s >= 0 && s < 2 * pairs) {
            a += weight * slopes[s] / completions[s];
        }
        coefficients[i] = static_cast<float>(a + poison);
    }

    double sides[2] = {0.0, 0.0};
    if (capped) {
        for (int i = thread; i < rows; i += BLOCK) {  // all rows of the batch
            sides[0] += owners[i] < pairs ? total[i] : 0.0;
            sides[1] += owners[i] < pairs ? 0.0 : total[i];
        }
        sides[0] = block_sum(sides[0]) / (counts[CHOSEN_ROWS] > 0 ? counts[CHOSEN_ROWS] : 1);
        sides[1] = block_sum(sides[1]) / (counts[REJECTED_ROWS] > 0 ? counts[REJECTED_ROWS] : 1);
    } else {
        // A mean in two parts has had the bias added twice.
        for (int part = 0; part < parts; ++part) {
            sides[0] += total[scored + 2 * part] - (part == 0 || bias_sum == nullptr ? 0.0f : *bias_sum);
            sides[1] += total[scored + 2 * part + 1] - (part == 0 || bias_sum == nullptr ? 0.0f : *bias_sum);
        }
    }
    if (thread == 0) {
        *nll = static_cast<float>(nll_sum);
        *loss = static_cast<float>(nll_sum - weight * values);
        *chosen_logits = counts[CHOSEN_ROWS] == 0 ? 0.0f : static_cast<float>(sides[0] / vocab);
        *rejected_logits = counts[REJECTED_ROWS] == 0 ? 0.0f : static_cast<float>(sides[1] / vocab);
        *empty = static_cast<i64>(missing);
    }
}
