/* A base layer's product for a few rows: y = x @ W^T + bias.
 *
 * W lies in memory as oneDNN packs it, in blocks of COLUMNS outputs, one after the other. In a
 * block step follows on step, and a step holds one word of each output: a float32, or two elements
 * of bfloat16 that follow each other in their row.
 *
 *   block 0: [word 0 of outputs 0 to 63] [word 1 of these] ...   block 1: [word 0 of 64 to 127] ...
 *
 * Decoding reads all of W for every batch. With 16 rows, multiplying them takes about as long as
 * reading, so that both have to go on at once. Some steps at a time meet all rows before the next
 * ones do, and lie in the first-level cache meanwhile; the next ones are fetched a step at a time
 * between the multiplications.
 *
 * Each output is the sum of the same products in the same order whatever the number of rows or
 * threads: a row's bits do not depend on the other rows.
 *
 * abi.h says how it is called.
 */
#include "threads.h"
#include "vectors.h"

const int64_t multilora_packed_call_bytes = sizeof(struct packed_call);

#if LANES == 16

#define COLUMNS 64
#define VECS (COLUMNS / LANES)
#define WORD 4
#define STEP (WORD * COLUMNS)
#define STEPS 32 /* at a time: 8 KiB */
#define ROWS 6   /* at a time: with VECS vectors of each, as many sums as the registers hold */

/* Some steps of a block. */
struct steps {
    const char *weights;
    int64_t count;
    int first;                            /* of the block, with which its sums begin */
    const char *fetch_from, *fetch_until; /* what is fetched meanwhile */
};

INLINE f32v add_words(f32v sums, u32v words, u32v x, const int dtype) {
#if defined(__AVX512BF16__)
    if (dtype == BF16) return add_products(sums, words, x);
#endif
    return mul_add((f32v)words, (f32v)x, sums);
}

/* Adds the products of some rows with a block's steps to their sums; x is the first row's first word
 * for these. */
INLINE void multiply_rows(struct steps *s, const char *x, int64_t row_bytes, float *sums,
                          const int rows, const int dtype) {
    f32v acc[ROWS][VECS];
    UNROLL for (int m = 0; m < rows; m++)
        UNROLL for (int n = 0; n < VECS; n++)
            acc[m][n] = s->first ? (f32v){0} : load(sums, m * COLUMNS + n * LANES, F32);
    const char *fetched = s->fetch_from;
    for (int64_t k = 0; k < s->count; k++) {
        u32v words[VECS];
        UNROLL for (int n = 0; n < VECS; n++)
            memcpy(&words[n], s->weights + k * STEP + n * CACHE_LINE, CACHE_LINE);
        if (fetched < s->fetch_until) {
            UNROLL for (int i = 0; i < STEP; i += CACHE_LINE)
                __builtin_prefetch(fetched + i, 0, FETCH_LOCALITY);
            fetched += STEP;
        }
        UNROLL for (int m = 0; m < rows; m++) {
            uint32_t word;
            memcpy(&word, x + m * row_bytes + k * WORD, WORD);
            UNROLL for (int n = 0; n < VECS; n++)
                acc[m][n] = add_words(acc[m][n], words[n], in_all_lanes(word), dtype);
        }
    }
    s->fetch_from = fetched;
    UNROLL for (int m = 0; m < rows; m++)
        UNROLL for (int n = 0; n < VECS; n++)
            store(sums, m * COLUMNS + n * LANES, acc[m][n], F32);
}

/* A function of its own for each, since all in one would run out of registers. */
typedef void multiply(struct steps *s, const char *x, int64_t row_bytes, float *sums);
#define MULTIPLY(NUMBER, DTYPE)                                                                    \
    static NOINLINE void multiply_##NUMBER##_##DTYPE(struct steps *s, const char *x,               \
                                                     int64_t row_bytes, float *sums) {             \
        multiply_rows(s, x, row_bytes, sums, NUMBER, DTYPE);                                       \
    }
#define MULTIPLY_ALL(DTYPE)                                                                        \
    MULTIPLY(1, DTYPE) MULTIPLY(2, DTYPE) MULTIPLY(3, DTYPE)                                       \
    MULTIPLY(4, DTYPE) MULTIPLY(5, DTYPE) MULTIPLY(6, DTYPE)                                       \
    static multiply *const multiply_##DTYPE[ROWS] = {                                              \
        multiply_1_##DTYPE, multiply_2_##DTYPE, multiply_3_##DTYPE,                                \
        multiply_4_##DTYPE, multiply_5_##DTYPE, multiply_6_##DTYPE,                                \
    };
MULTIPLY_ALL(F32)
#if defined(__AVX512BF16__)
MULTIPLY_ALL(BF16)
#endif

INLINE multiply *const *functions_of(int64_t dtype) {
#if defined(__AVX512BF16__)
    if (dtype == BF16) return multiply_BF16;
#endif
    return dtype == F32 ? multiply_F32 : NULL;
}

/* Bytes of a row of weights, and of a row of x as far as it meets them. */
INLINE int64_t k_bytes(const struct packed_call *c) { return c->k * (int64_t)width_of((int)c->dtype); }

/* Puts all rows' sums of a block into y. */
static void put_block(const struct packed_call *c, int64_t column, const float *sums) {
    int dtype = (int)c->dtype;
    for (int64_t m = 0; m < c->rows; m++) {
        for (int64_t n = 0; n < COLUMNS; n += LANES) {
            f32v sum = load(sums, m * COLUMNS + n, F32);
            if (c->bias) sum += load((const void *)c->bias, column + n, dtype);
            store((void *)c->y, m * c->y_row_stride + column + n, sum, dtype);
        }
    }
}

/* All rows against a block; the weights that are read after it are fetched as far as `end`. */
static void multiply_block(const struct packed_call *c, int64_t block, const char *end) {
    _Alignas(CACHE_LINE) float sums[MAX_PACKED_ROWS * COLUMNS];
    multiply *const *of_rows = functions_of(c->dtype);
    int64_t row_bytes = c->x_row_stride * (int64_t)width_of((int)c->dtype);
    int64_t count = k_bytes(c) / WORD, groups = (c->rows + ROWS - 1) / ROWS;
    const char *weights = (const char *)c->weight + block * count * STEP;
    for (int64_t k = 0; k < count; k += STEPS) {
        struct steps s = {weights + k * STEP, min64(STEPS, count - k), k == 0, NULL, NULL};
        const char *next = s.weights + s.count * STEP;
        int64_t bytes = min64(STEPS * STEP, end - next);
        s.fetch_from = next;
        for (int64_t group = 0; group < groups; group++) {
            int64_t from = c->rows * group / groups, to = c->rows * (group + 1) / groups;
            s.fetch_until = next + bytes * (group + 1) / groups;
            of_rows[to - from - 1](&s, (const char *)c->x + from * row_bytes + k * WORD, row_bytes,
                                   sums + from * COLUMNS);
        }
    }
    put_block(c, block * COLUMNS, sums);
}

int64_t multilora_packed_columns(int64_t dtype) { return functions_of(dtype) ? COLUMNS : 0; }

void multilora_packed_linear(const struct packed_call *c) {
    int64_t blocks = c->columns / COLUMNS;
#pragma omp parallel num_threads((int)c->threads)
    {
        int64_t first = blocks * THREAD_INDEX / THREAD_COUNT;
        int64_t last = blocks * (THREAD_INDEX + 1) / THREAD_COUNT;
        const char *end = (const char *)c->weight + last * COLUMNS * k_bytes(c);
        for (int64_t block = first; block < last; block++) multiply_block(c, block, end);
    }
}

#else

int64_t multilora_packed_columns(int64_t dtype) {
    (void)dtype;
    return 0;
}

void multilora_packed_linear(const struct packed_call *c) { (void)c; }

#endif
