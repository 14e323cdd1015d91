/* Products with the weights of experts: y[row] = x[row] @ W[expert of the row]^T + bias.
 *
 * Rows are sorted by expert, so that those of one expert are a segment. W lies in memory as vLLM's
 * CPU build packs it: each expert in blocks of BLOCK outputs, one after the other, and a block
 * input by input, or in words of two inputs for processors with AMX:
 *
 *   single  [input 0 of outputs 0 to 15] [input 1 of these] ...
 *   words   [inputs 0 and 1 of output 0] [these of output 1] ... [inputs 2 and 3 of output 0] ...
 *
 * The weights are read where they lie, once for up to ROWS rows. The work is the list of segments'
 * strips of BLOCKS blocks, of which every thread takes one contiguous share by cost.
 *
 * Each output is the sum of the same products in the same order whatever the batch or the number of
 * threads: a row's bits do not depend on the other rows.
 */
#include "experts.h"
#include "threads.h"
#include "vectors.h"

#define BLOCK 16
#define BLOCK_VECS (BLOCK / LANES)
#if LANES == 16
#define BLOCKS 4 /* of a strip: with as many vectors of each, six rows fill the registers */
#define ROWS 6
#else
#define BLOCKS 1
#define ROWS 4
#endif
#define FETCHED 4096 /* bytes between what is read of a block and what is fetched */
#define READING 6 /* what it costs to read a strip, in rows that meet it */

const int64_t multilora_experts_call_bytes = sizeof(struct experts_call);
const int64_t multilora_experts_sum_call_bytes = sizeof(struct experts_sum_call);

/* Some blocks of an expert's weights, and some rows. */
struct strip {
    const char *weights;
    int64_t block_bytes, steps; /* a step is an input, or a word of two */
    const char *x;
    int64_t row_bytes;
    const float *bias;
    float *y;
    int64_t y_row_stride;
};

INLINE size_t step_bytes(const int packing) { return packing == BF16_SINGLE ? 2 : 4; }

#if defined(__AVX512BF16__)
#define WORDS_OF_X 1 /* words of x meet words of weights */
#else
#define WORDS_OF_X 0
#endif

/* acc[row][n] += products of a step's inputs. */
INLINE void add_step(const int rows, const int blocks, f32v acc[ROWS][BLOCKS * BLOCK_VECS],
                     const struct strip *s, int64_t step, const int packing) {
    const char *at = s->weights + step * BLOCK * (int64_t)step_bytes(packing);
    const int vecs = blocks * BLOCK_VECS;
    f32v first[BLOCKS * BLOCK_VECS], second[BLOCKS * BLOCK_VECS];
    UNROLL for (int n = 0; n < vecs; n++) {
        const char *from = at + n / BLOCK_VECS * s->block_bytes;
        int64_t element = n % BLOCK_VECS * LANES;
        if (n % BLOCK_VECS == 0) __builtin_prefetch(from + FETCHED, 0, FETCH_LOCALITY);
        if (packing == BF16_WORDS) {
            u32v words;
            memcpy(&words, from + element * 4, sizeof words);
            first[n] = WORDS_OF_X ? (f32v)words : (f32v)(words << 16);
            second[n] = (f32v)(words & 0xffff0000);
        } else {
            first[n] = load(from, element, packing == BF16_SINGLE ? BF16 : F32);
        }
    }
    UNROLL for (int m = 0; m < rows; m++) {
        const char *x = s->x + m * s->row_bytes;
#if WORDS_OF_X
        if (packing == BF16_WORDS) {
            uint32_t word;
            memcpy(&word, x + step * 4, sizeof word);
            UNROLL for (int n = 0; n < vecs; n++)
                acc[m][n] = add_products(acc[m][n], (u32v)first[n], in_all_lanes(word));
            continue;
        }
#endif
        const float *values = (const float *)x + (packing == BF16_WORDS ? 2 * step : step);
        UNROLL for (int n = 0; n < vecs; n++)
            acc[m][n] = mul_add(first[n], broadcast(values[0]), acc[m][n]);
        if (packing == BF16_WORDS)
            UNROLL for (int n = 0; n < vecs; n++)
                acc[m][n] = mul_add(second[n], broadcast(values[1]), acc[m][n]);
    }
}

INLINE void multiply_strip(const int rows, const int blocks, const struct strip *s,
                           const int packing) {
    f32v acc[ROWS][BLOCKS * BLOCK_VECS];
    UNROLL for (int m = 0; m < rows; m++)
        UNROLL for (int n = 0; n < blocks * BLOCK_VECS; n++) acc[m][n] = (f32v){0};
    for (int64_t step = 0; step < s->steps; step++) add_step(rows, blocks, acc, s, step, packing);
    UNROLL for (int m = 0; m < rows; m++)
        UNROLL for (int n = 0; n < blocks * BLOCK_VECS; n++) {
            f32v sum = acc[m][n];
            if (s->bias) sum += load(s->bias, n * LANES, F32);
            store(s->y + m * s->y_row_stride, n * LANES, sum, F32);
        }
}

/* A function of its own for each, since all in one would run out of registers. */
typedef void multiply(const struct strip *s);
#define MULTIPLY(NUMBER, PACKING)                                                                  \
    static NOINLINE void many_##NUMBER##_##PACKING(const struct strip *s) {                        \
        multiply_strip(NUMBER, BLOCKS, s, PACKING);                                                \
    }                                                                                              \
    static NOINLINE void one_##NUMBER##_##PACKING(const struct strip *s) {                         \
        multiply_strip(NUMBER, 1, s, PACKING);                                                     \
    }
#if LANES == 16
#define MULTIPLY_MORE(PACKING) MULTIPLY(5, PACKING) MULTIPLY(6, PACKING)
#define MORE(KIND, PACKING) KIND##_5_##PACKING, KIND##_6_##PACKING
#else
#define MULTIPLY_MORE(PACKING)
#define MORE(KIND, PACKING)
#endif
#define OF_ROWS(KIND, PACKING)                                                                     \
    {KIND##_1_##PACKING, KIND##_2_##PACKING, KIND##_3_##PACKING, KIND##_4_##PACKING,               \
     MORE(KIND, PACKING)}
#define MULTIPLY_ALL(PACKING)                                                                      \
    MULTIPLY(1, PACKING) MULTIPLY(2, PACKING) MULTIPLY(3, PACKING) MULTIPLY(4, PACKING)            \
    MULTIPLY_MORE(PACKING)                                                                         \
    static multiply *const multiply_##PACKING[2][ROWS] = {OF_ROWS(one, PACKING),                   \
                                                          OF_ROWS(many, PACKING)};
MULTIPLY_ALL(F32_SINGLE)
MULTIPLY_ALL(BF16_SINGLE)
MULTIPLY_ALL(BF16_WORDS)

INLINE multiply *function_of(int64_t packing, int64_t rows, int many) {
    if (packing == F32_SINGLE) return multiply_F32_SINGLE[many][rows - 1];
    if (packing == BF16_SINGLE) return multiply_BF16_SINGLE[many][rows - 1];
    return multiply_BF16_WORDS[many][rows - 1];
}

int64_t multilora_experts_x(int64_t packing) {
    return packing == BF16_WORDS && WORDS_OF_X ? BF16 : F32;
}

/* All rows of a segment against some blocks, from `block` on: BLOCKS of them, or one. */
static void multiply_segment(const struct experts_call *c, const int32_t *segment, int64_t block,
                             int many) {
    int64_t start = segment[SEGMENT_START], rows = segment[SEGMENT_ROWS];
    int64_t expert = segment[SEGMENT_EXPERT], column = block * BLOCK;
    int64_t width = c->packing == F32_SINGLE ? 4 : 2;
    int64_t x_width = (int64_t)width_of((int)multilora_experts_x(c->packing));
    struct strip s = {
        .weights = (const char *)c->weight + (expert * c->columns + column) * c->k * width,
        .block_bytes = BLOCK * c->k * width,
        .steps = c->packing == BF16_WORDS ? c->k / 2 : c->k,
        .row_bytes = c->x_row_stride * x_width,
        .bias = c->bias ? (const float *)c->bias + expert * c->columns + column : NULL,
        .y_row_stride = c->y_row_stride,
    };
    for (int64_t m = 0; m < rows; m += ROWS) {
        s.x = (const char *)c->x + (start + m) * s.row_bytes;
        s.y = (float *)c->y + (start + m) * c->y_row_stride + column;
        function_of(c->packing, min64(ROWS, rows - m), many)(&s);
    }
}

INLINE int64_t clamp(int64_t n, int64_t most) { return n < 0 ? 0 : min64(n, most); }

void multilora_experts(const struct experts_call *c) {
    const int32_t *segments = (const int32_t *)c->segments;
    int64_t blocks = c->columns / BLOCK, strips = (blocks + BLOCKS - 1) / BLOCKS, total = 0;
    for (int64_t i = 0; i < c->segment_count; i++)
        total += strips * (READING + segments[i * SEGMENT_INTS + SEGMENT_ROWS]);
#pragma omp parallel num_threads((int)c->threads)
    {
        int64_t begin = total * THREAD_INDEX / THREAD_COUNT, before = 0;
        int64_t end = total * (THREAD_INDEX + 1) / THREAD_COUNT;
        for (int64_t i = 0; i < c->segment_count && before < end; i++) {
            const int32_t *segment = segments + i * SEGMENT_INTS;
            int64_t cost = READING + segment[SEGMENT_ROWS];
            int64_t from = clamp((begin - before + cost - 1) / cost, strips);
            int64_t to = clamp((end - before + cost - 1) / cost, strips);
            for (int64_t block = from * BLOCKS; block < min64(to * BLOCKS, blocks);) {
                int many = block + BLOCKS <= blocks;
                multiply_segment(c, segment, block, many);
                block += many ? BLOCKS : 1;
            }
            before += strips * cost;
        }
    }
}

void multilora_experts_sum(const struct experts_sum_call *c) {
    const int32_t *places = (const int32_t *)c->places, *rows = (const int32_t *)c->rows;
    const float *weights = (const float *)c->weights;
    int dtype = (int)c->out_dtype;
#pragma omp parallel num_threads((int)c->threads)
    for (int64_t t = THREAD_INDEX; t < c->tokens; t += THREAD_COUNT) {
        int64_t to = rows[t] * c->out_row_stride;
        for (int64_t column = 0; column < c->width; column += LANES) {
            int64_t n = min64(LANES, c->width - column);
            f32v sum = {0};
            for (int64_t i = t * c->top_k; i < (t + 1) * c->top_k; i++) {
                const float *y = (const float *)c->y + places[i] * c->y_row_stride;
                f32v part = n < LANES ? load_part(y, column, n, F32) : load(y, column, F32);
                sum = mul_add(broadcast(weights[i]), part, sum);
            }
            if (n < LANES)
                store_part((void *)c->out, to + column, n, sum, dtype);
            else
                store((void *)c->out, to + column, sum, dtype);
        }
    }
}
