/* Sums of outer products: y[row, columns] += sum over j of h[row, j] * B[columns, j].
 *
 * Each is summed over j in order, from zero, whatever the block, and then added to y.
 */
#ifndef MULTILORA_OUTER_PRODUCTS_H
#define MULTILORA_OUTER_PRODUCTS_H

#include "vectors.h"

#define NB (2 * PAIR) /* output columns per step of the expand phase */
#define VECS (NB / LANES)
#define STREAMED_COLUMNS 2048 /* whose sums stay in the first-level cache */
#define SUMS_BETWEEN 64 /* after a row's sums: rows that are pages apart look alike */

INLINE void transpose8(f32x8 r[8]) {
    f32x8 t[8], u[8];
    for (int i = 0; i < 4; i++) {
        t[2 * i] = SHUF(r[2 * i], r[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        t[2 * i + 1] = SHUF(r[2 * i], r[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < 2; i++) {
        u[4 * i] = SHUF(t[4 * i], t[4 * i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
        u[4 * i + 1] = SHUF(t[4 * i], t[4 * i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        u[4 * i + 2] = SHUF(t[4 * i + 1], t[4 * i + 3], 0, 1, 8, 9, 4, 5, 12, 13);
        u[4 * i + 3] = SHUF(t[4 * i + 1], t[4 * i + 3], 2, 3, 10, 11, 6, 7, 14, 15);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = SHUF(u[i], u[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        r[i + 4] = SHUF(u[i], u[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

/* bt[j][0..NB) = column j of NB rows of B, for the first `rank` columns; absent rows are 0. */
INLINE void transpose_typed(float *bt, const void *b, int64_t b_start, int64_t ldb, int64_t rows,
                            int64_t rank, const int dtype) {
    for (int64_t j = 0; j < rank; j += 8) {
        int64_t n = min64(8, rank - j);
        for (int part = 0; part < NB; part += 8) {
            f32x8 block[8];
            for (int i = 0; i < 8; i++) {
                int64_t at = b_start + (part + i) * ldb + j;
                if (part + i >= rows) {
                    block[i] = (f32x8){0};
                } else if (n == 8) {
                    block[i] = load8(b, at, dtype);
                } else {
                    uint32_t buffer[8] = {0};
                    copy_elements(buffer, b, at, n, dtype);
                    block[i] = load8(buffer, 0, dtype);
                }
            }
            transpose8(block);
            for (int i = 0; i < n; i++) memcpy(bt + (j + i) * NB + part, &block[i], sizeof block[i]);
        }
    }
}

static void transpose_columns(float *bt, const void *b, int64_t b_start, int64_t ldb, int64_t rows,
                              int64_t rank, int dtype) {
    if (dtype == F32) transpose_typed(bt, b, b_start, ldb, rows, rank, F32);
    else if (dtype == BF16) transpose_typed(bt, b, b_start, ldb, rows, rank, BF16);
    else transpose_typed(bt, b, b_start, ldb, rows, rank, F16);
}

/* Fetches some columns of a row of y, of which the hardware foresees none: its rows are too far
 * apart. */
INLINE void fetch_columns(const void *y, int64_t col, const int cols, const int dtype) {
    const char *from = (const char *)y + (size_t)col * width_of(dtype);
    UNROLL for (int i = 0; i < cols * (int)width_of(dtype); i += CACHE_LINE)
        __builtin_prefetch(from + i, 1);
}

/* Puts ROWS x VECS vectors of sums into y, their first `cols` columns. */
INLINE void put_block(const int rows, const int vecs, f32v acc[6][VECS], void *const *y,
                      int64_t col, int64_t cols, struct onto onto, const int y_dtype,
                      const int split) {
    /* Asked once: the calls for part of a pair need all registers, and would leave none to the sums. */
    const int whole = __builtin_expect(cols >= vecs * LANES, 1);
    UNROLL for (int m = 0; m < rows; m++) {
        if (!y[m]) continue;
        UNROLL for (int n = 0; n < vecs; n += 2) {
            struct onto there = onto_column(onto, n * LANES);
            if (whole)
                put_pair(y[m], col + n * LANES, acc[m][n], acc[m][n + 1], there, y_dtype, split);
            else if (n * LANES < cols)
                put_columns(y[m], col + n * LANES, cols - n * LANES, acc[m][n], acc[m][n + 1], there,
                            y_dtype, split);
        }
    }
}

/* ROWS x VECS vectors of y: their first `cols` columns, against rank rows of bt. */
INLINE void outer_block(const int rows, const int vecs, const float *h, int64_t ldh,
                        const void *bt, int64_t bt_start, int64_t ldbt, int64_t rank,
                        void *const *y, int64_t col, int64_t cols, struct onto onto,
                        const int b_dtype, const int y_dtype) {
    const int split = b_dtype == BF16;
    const size_t b_width = width_of(b_dtype);
    f32v acc[6][VECS];
    UNROLL for (int m = 0; m < rows; m++) {
        fetch_columns(y[m], col + NB, vecs * LANES, y_dtype);
        UNROLL for (int n = 0; n < vecs; n++) acc[m][n] = (f32v){0};
    }
    if (cols >= vecs * LANES) {
        for (int64_t j = 0; j < rank; j++) {
            int64_t at = bt_start + j * ldbt;
            /* The next columns: rows of bt are too far apart for the hardware to foresee. */
            UNROLL for (int n = 0; n < vecs * LANES; n += CACHE_LINE / (int)b_width)
                __builtin_prefetch((const char *)bt + (size_t)(at + NB + n) * b_width);
            f32v b[VECS];
            UNROLL for (int n = 0; n < vecs; n++)
                b[n] = load_half(bt, at + n / 2 * PAIR, n % 2, b_dtype);
            UNROLL for (int m = 0; m < rows; m++) {
                f32v v = broadcast(h[m * ldh + j]);
                UNROLL for (int n = 0; n < vecs; n++) acc[m][n] = mul_add(v, b[n], acc[m][n]);
            }
        }
    } else {
        for (int64_t j = 0; j < rank; j++) {
            uint32_t buffer[NB] = {0};
            copy_elements(buffer, bt, bt_start + j * ldbt, cols, b_dtype);
            UNROLL for (int n = 0; n < vecs; n++) {
                f32v b = load_half(buffer, n / 2 * PAIR, n % 2, b_dtype);
                UNROLL for (int m = 0; m < rows; m++)
                    acc[m][n] = mul_add(broadcast(h[m * ldh + j]), b, acc[m][n]);
            }
        }
    }
    put_block(rows, vecs, acc, y, col, cols, onto, y_dtype, split);
}

/* All rows of a tile against NB columns; few rows use wide blocks, many rows tall ones. */
INLINE void outer_typed(const float *h, int64_t ldh, int64_t rows, const void *bt,
                        int64_t bt_start, int64_t ldbt, int64_t rank, void *const *y, int64_t col,
                        int64_t cols, struct onto onto, const int b_dtype, const int y_dtype) {
    int64_t m = 0;
    for (; m + 4 <= rows;) {
        int tall = m + 6 <= rows;
        for (int64_t c = 0; c < cols; c += TALL_VECS * LANES) {
            if (tall)
                outer_block(6, TALL_VECS, h + m * ldh, ldh, bt, bt_start + c, ldbt, rank, y + m,
                            col + c, cols - c, onto_column(onto, c), b_dtype, y_dtype);
            else
                outer_block(4, TALL_VECS, h + m * ldh, ldh, bt, bt_start + c, ldbt, rank, y + m,
                            col + c, cols - c, onto_column(onto, c), b_dtype, y_dtype);
        }
        m += tall ? 6 : 4;
    }
    if (m + 2 <= rows) {
        outer_block(2, VECS, h + m * ldh, ldh, bt, bt_start, ldbt, rank, y + m, col, cols, onto,
                    b_dtype, y_dtype);
        m += 2;
    }
    if (m < rows)
        outer_block(1, VECS, h + m * ldh, ldh, bt, bt_start, ldbt, rank, y + m, col, cols, onto,
                    b_dtype, y_dtype);
}

/* Puts a row's sums of some columns into y. */
INLINE void put_sums(const float *sums, void *y, int64_t col, int64_t cols, struct onto onto,
                     const int y_dtype, const int split) {
    for (int64_t c = 0; y && c < cols; c += PAIR)
        put_columns(y, col + c, cols - c, load(sums, c, F32), load(sums, c + LANES, F32),
                    onto_column(onto, c), y_dtype, split);
}

/* A few rows against contiguous columns of B, one whole column after the other: nearly all of
 * the time goes into reading B, and this reads it in the order in which it lies in memory. The
 * sums wait in the first-level cache. */
INLINE void stream_typed(const int rows, const float *h, int64_t ldh, const void *b,
                         int64_t b_start, int64_t ldb, int64_t rank, void *const *y, int64_t col,
                         int64_t cols, struct onto onto, struct fetching *fetching,
                         const int b_dtype, const int y_dtype) {
    const size_t b_width = width_of(b_dtype);
    _Alignas(CACHE_LINE) float sums[STREAMED_ROWS][STREAMED_COLUMNS + SUMS_BETWEEN];
    for (int m = 0; m < rows; m++)
        memset(sums[m], 0, (size_t)round_up(cols, PAIR) * sizeof sums[m][0]);
    for (int64_t j = 0; j < rank; j++) {
        int64_t at = b_start + j * ldb;
        f32v v[STREAMED_ROWS];
        UNROLL for (int m = 0; m < rows; m++) v[m] = broadcast(h[m * ldh + j]);
        for (int64_t c = 0; c < cols; c += PAIR) {
            uint32_t end[PAIR];
            const char *from = (const char *)b + (size_t)(at + c) * b_width;
            if (cols - c < PAIR) {
                memset(end, 0, sizeof end);
                copy_elements(end, b, at + c, cols - c, b_dtype);
                from = (const char *)end;
            } else {
                fetch(fetching, PAIR * (int)b_width);
            }
            UNROLL for (int half = 0; half < 2; half++) {
                f32v w = load_half(from, 0, half, b_dtype);
                UNROLL for (int m = 0; m < rows; m++) {
                    float *sum = sums[m] + c + half * LANES;
                    store(sum, 0, mul_add(v[m], w, load(sum, 0, F32)), F32);
                }
            }
        }
    }
    for (int m = 0; m < rows; m++)
        put_sums(sums[m], y[m], col, cols, onto, y_dtype, b_dtype == BF16);
}

#define EXPAND(B_DTYPE, Y_DTYPE)                                                                   \
    static NOINLINE void outer_##B_DTYPE##_##Y_DTYPE(                                              \
        const float *h, int64_t ldh, int64_t rows, const void *bt, int64_t bt_start, int64_t ldbt, \
        int64_t rank, void *const *y, int64_t col, int64_t cols, struct onto onto) {               \
        outer_typed(h, ldh, rows, bt, bt_start, ldbt, rank, y, col, cols, onto, B_DTYPE, Y_DTYPE); \
    }                                                                                              \
    static NOINLINE void stream_##B_DTYPE##_##Y_DTYPE(                                             \
        const float *h, int64_t ldh, int64_t rows, const void *b, int64_t b_start, int64_t ldb,    \
        int64_t rank, void *const *y, int64_t col, int64_t cols, struct onto onto,                 \
        struct fetching *fetching) {                                                               \
        if (rows == 1)                                                                             \
            stream_typed(1, h, ldh, b, b_start, ldb, rank, y, col, cols, onto, fetching, B_DTYPE,  \
                         Y_DTYPE);                                                                 \
        else                                                                                       \
            stream_typed(2, h, ldh, b, b_start, ldb, rank, y, col, cols, onto, fetching, B_DTYPE,  \
                         Y_DTYPE);                                                                 \
    }
EXPAND(F32, F32) EXPAND(F32, BF16) EXPAND(F32, F16)
EXPAND(BF16, F32) EXPAND(BF16, BF16) EXPAND(BF16, F16)
EXPAND(F16, F32) EXPAND(F16, BF16) EXPAND(F16, F16)

typedef void expand_function(const float *, int64_t, int64_t, const void *, int64_t, int64_t,
                             int64_t, void *const *, int64_t, int64_t, struct onto);
typedef void stream_function(const float *, int64_t, int64_t, const void *, int64_t, int64_t,
                             int64_t, void *const *, int64_t, int64_t, struct onto,
                             struct fetching *);
#define BY_TYPES(NAME) /* [type of B][type of y] */                                                \
    {{NAME##_F32_F32, NAME##_F32_BF16, NAME##_F32_F16},                                            \
     {NAME##_BF16_F32, NAME##_BF16_BF16, NAME##_BF16_F16},                                         \
     {NAME##_F16_F32, NAME##_F16_BF16, NAME##_F16_F16}}
static expand_function *const outer_columns[3][3] = BY_TYPES(outer);
static stream_function *const stream_columns[3][3] = BY_TYPES(stream);

#endif
