/* Segment GEMM for CPUs: y[t] += (x[t] @ A[slot(t)]^T) @ B[slot(t)]^T, per run of tokens.
 *
 * The plan (multilora_kernels.plan) sorts a batch's tokens by adapter slot and cuts every
 * slot's run into tiles. A panel is a group of whole tiles with at most PANEL_ROWS rows. Each
 * panel takes two phases, with a barrier between them:
 *
 *   shrink   h[row, slice, :r] = dot products of the row of x with the first r rows of A
 *   expand   y[row] += sum over j < r of h[row, slice, j] * column j of B
 *
 * A phase's work is the list of (tile, slice) pairs, each with a cost that follows from its
 * rows, its true rank and the slice's width. Every thread takes one contiguous share of the
 * total cost, cutting pairs by rank or column where a share ends: no queue, no atomics, and one
 * adapter with many tokens is shared between threads as well as many adapters with one each.
 *
 * Only the first r = rank(slice, slot) rows of A and columns of B are read, so time follows
 * the true ranks. B's columns are contiguous if the caller stores it so (b_col_stride == 1,
 * r whole columns are streamed); if its rows are, blocks of it are transposed on the way.
 *
 * Each output element is the sum of the same products in the same order whatever the batch,
 * the layout of B or the number of threads: a row's bits do not depend on the other rows.
 *
 * Plain C11 with the vector extensions that GCC and Clang share; 8 float32 lanes throughout,
 * which compilers map to one AVX register or two NEON ones. No Python or torch headers: the
 * caller passes addresses (see native/__init__.py, which mirrors struct lora_call).
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__F16C__) || defined(__FMA__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(_OPENMP)
int omp_get_thread_num(void);
int omp_get_num_threads(void);
#define THREAD_INDEX omp_get_thread_num()
#define THREAD_COUNT omp_get_num_threads()
#else
#define THREAD_INDEX 0
#define THREAD_COUNT 1
#endif

#define LANES 8
#define NB 32          /* output columns per step of the expand phase */
#define PANEL_ROWS 256 /* bounds the memory for h: rows * slices * R floats */
#define MAX_TILE_ROWS 256
#define RANK_STEP 3 /* rows of A per dot-product block */
#define MAX_SLICES 16

typedef float f32v __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t u32v __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t u16v __attribute__((vector_size(2 * LANES), aligned(2)));

enum dtype { F32 = 0, BF16 = 1, F16 = 2 };

/* The plan buffer's header; must match plan.py. */
enum { PLAN_TOKENS = 0, PLAN_ROWS = 1, PLAN_RUNS = 2, PLAN_TILES = 3 };

enum mode { MODE_LINEAR = 0, MODE_SHRINK = 1, MODE_EXPAND = 2 };

struct slice {
    int64_t a, a_slot_stride, a_row_stride;               /* address; strides in elements */
    int64_t b, b_slot_stride, b_row_stride, b_col_stride; /* one of the last two is 1 */
    int64_t cols;   /* output columns N_i */
    int64_t offset; /* first of them, from y_offset on */
};

struct lora_call {
    /* What a layer's weights fix once. */
    int64_t mode, slices, k, max_rank, weight_dtype;
    int64_t ranks, ranks_stride; /* int32 [slices, slots] */
    int64_t overwrite;           /* 1: y = delta instead of y += delta, for every row */
    double scale;
    /* What changes from call to call. */
    int64_t threads, scratch;
    int64_t tokens; /* rows of x (or h) and y; plan entries at or past it are skipped */
    int64_t x, x_row_stride, x_dtype;
    int64_t y, y_row_stride, y_dtype, y_offset;
    int64_t h, h_slice_stride, h_row_stride, h_dtype; /* for the shrink and expand halves */
    int64_t plan, order, tile_slot, tile_start, tile_rows;
    struct slice slice[MAX_SLICES];
};

#define INLINE static inline __attribute__((always_inline))

INLINE size_t width_of(int dtype) { return dtype == F32 ? 4 : 2; }

INLINE float f16_to_f32(uint16_t bits) {
    _Float16 half;
    memcpy(&half, &bits, 2);
    return (float)half;
}

INLINE f32v load(const void *base, int64_t index, int dtype) {
    if (dtype == F32) {
        f32v v;
        memcpy(&v, (const float *)base + index, sizeof v);
        return v;
    }
    u16v raw;
    memcpy(&raw, (const uint16_t *)base + index, sizeof raw);
    if (dtype == BF16) return (f32v)(__builtin_convertvector(raw, u32v) << 16);
#if defined(__F16C__)
    return (f32v)_mm256_cvtph_ps((__m128i)raw);
#else
    f32v v;
    for (int i = 0; i < LANES; i++) v[i] = f16_to_f32(raw[i]);
    return v;
#endif
}

/* The first n < LANES elements at index, zeros after them; reads nothing past them. */
INLINE f32v load_part(const void *base, int64_t index, int64_t n, int dtype) {
    uint32_t buffer[LANES] = {0};
    memcpy(buffer, (const char *)base + (size_t)index * width_of(dtype), (size_t)n * width_of(dtype));
    return load(buffer, 0, dtype);
}

/* float32 to bfloat16, round to nearest even; NaN stays a (quiet) NaN. */
INLINE u16v to_bf16(f32v v) {
    u32v bits = (u32v)v;
    u32v rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    u32v nan = (u32v)(v != v);
    return __builtin_convertvector((rounded & ~nan) | (((bits >> 16) | 0x40) & nan), u16v);
}

INLINE void store(void *base, int64_t index, f32v v, int dtype) {
    if (dtype == F32) {
        memcpy((float *)base + index, &v, sizeof v);
        return;
    }
    u16v raw;
    if (dtype == BF16) {
        raw = to_bf16(v);
    } else {
#if defined(__F16C__)
        raw = (u16v)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
        for (int i = 0; i < LANES; i++) {
            _Float16 half = (_Float16)v[i];
            uint16_t bits;
            memcpy(&bits, &half, 2);
            raw[i] = bits;
        }
#endif
    }
    memcpy((uint16_t *)base + index, &raw, sizeof raw);
}

INLINE void store_part(void *base, int64_t index, int64_t n, f32v v, int dtype) {
    uint32_t buffer[LANES];
    store(buffer, 0, v, dtype);
    memcpy((char *)base + (size_t)index * width_of(dtype), buffer, (size_t)n * width_of(dtype));
}

/* a * b + c. Spelled out, because compilers contract the expression in some instances of a
 * function and not in others, and then a row's bits would depend on the block it is in. */
INLINE f32v mul_add(f32v a, f32v b, f32v c) {
#if defined(__FMA__)
    return (f32v)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
    f32v out;
    for (int half = 0; half < LANES; half += 4)
        vst1q_f32((float *)&out + half,
                  vfmaq_f32(vld1q_f32((float *)&c + half), vld1q_f32((float *)&a + half),
                            vld1q_f32((float *)&b + half)));
    return out;
#else
    return a * b + c;
#endif
}

INLINE f32v broadcast(float value) { return value - (f32v){0}; }

INLINE float sum_lanes(f32v v) {
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

/* ---- gather: one row of x (or h) widened to float32, zero-padded to whole vectors ---- */

INLINE void widen_row(float *out, const void *in, int64_t start, int64_t n, int dtype) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(out, i, load(in, start + i, dtype), F32);
    if (i < n) store(out, i, load_part(in, start + i, n - i, dtype), F32);
}

static void gather_row(float *out, const void *in, int64_t start, int64_t n, int dtype) {
    if (dtype == F32) widen_row(out, in, start, n, F32);
    else if (dtype == BF16) widen_row(out, in, start, n, BF16);
    else widen_row(out, in, start, n, F16);
}

/* ---- shrink: ROWS x RANKS dot products of length k ---- */

INLINE void dot_block(const int rows, const int ranks, const float *x, int64_t ldx,
                      const void *a, int64_t a_start, int64_t lda, int64_t k, float scale,
                      float *h, int64_t ldh, const int dtype) {
    f32v acc[4][RANK_STEP];
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < ranks; n++) acc[m][n] = (f32v){0};
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES) {
        f32v w[RANK_STEP];
        for (int n = 0; n < ranks; n++) w[n] = load(a, a_start + n * lda + i, dtype);
        for (int m = 0; m < rows; m++) {
            f32v v = load(x, m * ldx + i, F32);
            for (int n = 0; n < ranks; n++) acc[m][n] = mul_add(v, w[n], acc[m][n]);
        }
    }
    if (i < k) {
        for (int n = 0; n < ranks; n++) {
            f32v w = load_part(a, a_start + n * lda + i, k - i, dtype);
            for (int m = 0; m < rows; m++) acc[m][n] = mul_add(load(x, m * ldx + i, F32), w, acc[m][n]);
        }
    }
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < ranks; n++) h[m * ldh + n] = scale * sum_lanes(acc[m][n]);
}

INLINE void dot_rows(const int rows, const float *x, int64_t ldx, const void *a, int64_t a_start,
                     int64_t lda, int64_t k, int64_t ranks, float scale, float *h, int64_t ldh,
                     const int dtype) {
    int64_t n = 0;
    for (; n + RANK_STEP <= ranks; n += RANK_STEP)
        dot_block(rows, RANK_STEP, x, ldx, a, a_start + n * lda, lda, k, scale, h + n, ldh, dtype);
    for (; n < ranks; n++)
        dot_block(rows, 1, x, ldx, a, a_start + n * lda, lda, k, scale, h + n, ldh, dtype);
}

INLINE void shrink_typed(const float *x, int64_t ldx, int64_t rows, const void *a, int64_t a_start,
                         int64_t lda, int64_t k, int64_t ranks, float scale, float *h, int64_t ldh,
                         const int dtype) {
    int64_t m = 0;
    for (; m + 4 <= rows; m += 4)
        dot_rows(4, x + m * ldx, ldx, a, a_start, lda, k, ranks, scale, h + m * ldh, ldh, dtype);
    if (m + 2 <= rows) {
        dot_rows(2, x + m * ldx, ldx, a, a_start, lda, k, ranks, scale, h + m * ldh, ldh, dtype);
        m += 2;
    }
    if (m < rows)
        dot_rows(1, x + m * ldx, ldx, a, a_start, lda, k, ranks, scale, h + m * ldh, ldh, dtype);
}

static void shrink_unit(const float *x, int64_t ldx, int64_t rows, const void *a, int64_t a_start,
                        int64_t lda, int64_t k, int64_t ranks, float scale, float *h, int64_t ldh,
                        int dtype) {
    if (dtype == F32)
        shrink_typed(x, ldx, rows, a, a_start, lda, k, ranks, scale, h, ldh, F32);
    else if (dtype == BF16)
        shrink_typed(x, ldx, rows, a, a_start, lda, k, ranks, scale, h, ldh, BF16);
    else
        shrink_typed(x, ldx, rows, a, a_start, lda, k, ranks, scale, h, ldh, F16);
}

/* ---- expand: NB columns of y at a time, sums over j kept in registers ---- */

#define SHUF(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)

INLINE void transpose8(f32v r[8]) {
    f32v t[8], u[8];
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
    for (int64_t j = 0; j < rank; j += LANES) {
        int64_t n = min64(LANES, rank - j);
        for (int part = 0; part < NB; part += LANES) {
            f32v block[LANES];
            for (int i = 0; i < LANES; i++) {
                int64_t at = b_start + (part + i) * ldb + j;
                if (part + i >= rows) block[i] = (f32v){0};
                else if (n == LANES) block[i] = load(b, at, dtype);
                else block[i] = load_part(b, at, n, dtype);
            }
            transpose8(block);
            for (int i = 0; i < n; i++) store(bt, (j + i) * NB + part, block[i], F32);
        }
    }
}

static void transpose_columns(float *bt, const void *b, int64_t b_start, int64_t ldb, int64_t rows,
                              int64_t rank, int dtype) {
    if (dtype == F32) transpose_typed(bt, b, b_start, ldb, rows, rank, F32);
    else if (dtype == BF16) transpose_typed(bt, b, b_start, ldb, rows, rank, BF16);
    else transpose_typed(bt, b, b_start, ldb, rows, rank, F16);
}

/* ROWS x VECS vectors of y: their first `cols` columns, against rank rows of bt. */
INLINE void outer_block(const int rows, const int vecs, const float *h, int64_t ldh,
                        const void *bt, int64_t bt_start, int64_t ldbt, int64_t rank,
                        void *const *y, int64_t col, int64_t cols, int add, const int b_dtype,
                        const int y_dtype) {
    f32v acc[6][NB / LANES];
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < vecs; n++) acc[m][n] = (f32v){0};
    if (cols >= vecs * LANES) {
        for (int64_t j = 0; j < rank; j++) {
            int64_t at = bt_start + j * ldbt;
            /* The next columns: rows of bt are too far apart for the hardware to foresee. */
            for (int n = 0; n < vecs * LANES; n += 64 / (int)width_of(b_dtype))
                __builtin_prefetch((const char *)bt + (size_t)(at + NB + n) * width_of(b_dtype));
            f32v b[NB / LANES];
            for (int n = 0; n < vecs; n++) b[n] = load(bt, at + n * LANES, b_dtype);
            for (int m = 0; m < rows; m++) {
                f32v v = broadcast(h[m * ldh + j]);
                for (int n = 0; n < vecs; n++) acc[m][n] = mul_add(v, b[n], acc[m][n]);
            }
        }
    } else {
        for (int64_t j = 0; j < rank; j++)
            for (int n = 0; n * LANES < cols; n++) {
                int64_t at = bt_start + j * ldbt + n * LANES, left = cols - n * LANES;
                f32v b = left >= LANES ? load(bt, at, b_dtype) : load_part(bt, at, left, b_dtype);
                for (int m = 0; m < rows; m++)
                    acc[m][n] = mul_add(broadcast(h[m * ldh + j]), b, acc[m][n]);
            }
    }
    for (int m = 0; m < rows; m++) {
        if (!y[m]) continue;
        for (int n = 0; n < vecs; n++) {
            int64_t left = cols - n * LANES, at = col + n * LANES;
            f32v v = acc[m][n];
            if (left >= LANES) {
                if (add) v += load(y[m], at, y_dtype);
                store(y[m], at, v, y_dtype);
            } else if (left > 0) {
                if (add) v += load_part(y[m], at, left, y_dtype);
                store_part(y[m], at, left, v, y_dtype);
            }
        }
    }
}

/* All rows of a tile against NB columns; few rows use wide blocks, many rows tall ones. */
INLINE void outer_typed(const float *h, int64_t ldh, int64_t rows, const void *bt,
                        int64_t bt_start, int64_t ldbt, int64_t rank, void *const *y, int64_t col,
                        int64_t cols, int add, const int b_dtype, const int y_dtype) {
    int64_t m = 0;
    for (; m + 4 <= rows;) {
        int tall = m + 6 <= rows;
        for (int64_t c = 0; c < cols; c += 2 * LANES) {
            if (tall)
                outer_block(6, 2, h + m * ldh, ldh, bt, bt_start + c, ldbt, rank, y + m, col + c,
                            cols - c, add, b_dtype, y_dtype);
            else
                outer_block(4, 2, h + m * ldh, ldh, bt, bt_start + c, ldbt, rank, y + m, col + c,
                            cols - c, add, b_dtype, y_dtype);
        }
        m += tall ? 6 : 4;
    }
    if (m + 2 <= rows) {
        outer_block(2, 4, h + m * ldh, ldh, bt, bt_start, ldbt, rank, y + m, col, cols, add,
                    b_dtype, y_dtype);
        m += 2;
    }
    if (m < rows)
        outer_block(1, 4, h + m * ldh, ldh, bt, bt_start, ldbt, rank, y + m, col, cols, add,
                    b_dtype, y_dtype);
}

#define OUTER(B_DTYPE, Y_DTYPE)                                                                   \
    outer_typed(h, ldh, rows, bt, bt_start, ldbt, rank, y, col, cols, add, B_DTYPE, Y_DTYPE)

static void outer_columns(const float *h, int64_t ldh, int64_t rows, const void *bt,
                          int64_t bt_start, int64_t ldbt, int64_t rank, void *const *y,
                          int64_t col, int64_t cols, int add, int b_dtype, int y_dtype) {
    if (y_dtype == F32) {
        if (b_dtype == F32) OUTER(F32, F32);
        else if (b_dtype == BF16) OUTER(BF16, F32);
        else OUTER(F16, F32);
    } else if (y_dtype == BF16) {
        if (b_dtype == F32) OUTER(F32, BF16);
        else if (b_dtype == BF16) OUTER(BF16, BF16);
        else OUTER(F16, BF16);
    } else {
        if (b_dtype == F32) OUTER(F32, F16);
        else if (b_dtype == BF16) OUTER(BF16, F16);
        else OUTER(F16, F16);
    }
}

/* ---- a thread's share of a phase ---- */

struct panel {
    int64_t first_tile, last_tile; /* tiles [first, last) */
    int64_t first_row;             /* in sorted order */
};

struct thread {
    int64_t index, count;
    float *tile; /* own scratch: a tile's rows of x or h in float32 */
    float *bt;   /* own scratch: transposed columns of B */
    int64_t gathered; /* which rows `tile` holds, to gather them once; -1 for none */
};

INLINE int64_t rank_of(const struct lora_call *c, int64_t slice, int64_t slot) {
    return ((const int32_t *)c->ranks)[slice * c->ranks_stride + slot];
}

INLINE int32_t entry(int64_t table, int64_t index) { return ((const int32_t *)table)[index]; }

INLINE void *row_of(int64_t base, int64_t row, int64_t stride, int dtype) {
    return (char *)base + (size_t)(row * stride) * width_of(dtype);
}

static void zero_span(void *base, int64_t index, int64_t n, int dtype) {
    memset((char *)base + (size_t)index * width_of(dtype), 0, (size_t)n * width_of(dtype));
}

/* Cost of a pair: weights are read once and used for every row; 4 stands for the reading. */
INLINE int64_t cost_of(const struct lora_call *c, int64_t tile, int64_t rank, int64_t width) {
    return (rank + 1) * width * (4 + entry(c->tile_rows, tile));
}

/* The part [from, to) of `size` steps of `step` that falls into this thread's share, for a pair
 * whose cost lies at [begin, begin + cost) of the phase's total. Neighbours cut alike. */
INLINE void share_of(const struct thread *t, int64_t total, int64_t begin, int64_t cost,
                     int64_t size, int64_t step, int64_t *from, int64_t *to) {
    int64_t low = total / t->count * t->index - begin;
    int64_t high = t->index + 1 == t->count ? total : total / t->count * (t->index + 1);
    high -= begin;
    *from = low <= 0 ? 0 : low >= cost ? size : size * low / cost / step * step;
    *to = high <= 0 ? 0 : high >= cost ? size : size * high / cost / step * step;
}

static void gather_tile(const struct lora_call *c, struct thread *t, int64_t tile, int64_t slice) {
    int64_t key = c->mode == MODE_EXPAND ? tile * c->slices + slice : tile;
    if (t->gathered == key) return;
    t->gathered = key;
    int64_t start = entry(c->tile_start, tile), rows = entry(c->tile_rows, tile);
    for (int64_t m = 0; m < rows; m++) {
        int64_t token = entry(c->order, start + m);
        if (token >= c->tokens) continue;
        if (c->mode == MODE_EXPAND)
            gather_row(t->tile + m * round_up(c->max_rank, LANES), (const void *)c->h,
                       slice * c->h_slice_stride + token * c->h_row_stride, c->max_rank,
                       (int)c->h_dtype);
        else
            gather_row(t->tile + m * round_up(c->k, LANES), (const void *)c->x,
                       token * c->x_row_stride, c->k, (int)c->x_dtype);
    }
}

/* Ranks [from, to) of one pair, into hs or, for the shrink half alone, the caller's h. */
static void shrink_pair(const struct lora_call *c, struct thread *t, const struct panel *p,
                        float *hs, int64_t tile, int64_t s, int64_t from, int64_t to) {
    const struct slice *w = &c->slice[s];
    int64_t slot = entry(c->tile_slot, tile), start = entry(c->tile_start, tile);
    int64_t rows = entry(c->tile_rows, tile), ldh = round_up(c->max_rank, LANES);
    int64_t ldx = round_up(c->k, LANES);
    float *h = hs + ((start - p->first_row) * c->slices + s) * ldh;
    gather_tile(c, t, tile, s);
    shrink_unit(t->tile, ldx, rows, (const void *)w->a,
                slot * w->a_slot_stride + from * w->a_row_stride, w->a_row_stride, c->k, to - from,
                (float)c->scale, h + from, c->slices * ldh, (int)c->weight_dtype);
}

static void write_h(const struct lora_call *c, const struct panel *p, const float *hs, int64_t tile,
                    int64_t s) {
    int64_t start = entry(c->tile_start, tile), ldh = round_up(c->max_rank, LANES);
    int64_t rank = rank_of(c, s, entry(c->tile_slot, tile));
    for (int64_t m = 0; m < entry(c->tile_rows, tile); m++) {
        int64_t token = entry(c->order, start + m), i = 0;
        if (token >= c->tokens) continue;
        const float *from = hs + ((start + m - p->first_row) * c->slices + s) * ldh;
        int64_t to = s * c->h_slice_stride + token * c->h_row_stride;
        for (; i + LANES <= rank; i += LANES)
            store((void *)c->h, to + i, load(from, i, F32), (int)c->h_dtype);
        if (i < rank)
            store_part((void *)c->h, to + i, rank - i, load_part(from, i, rank - i, F32),
                       (int)c->h_dtype);
        zero_span((void *)c->h, to + rank, c->max_rank - rank, (int)c->h_dtype);
    }
}

/* Columns [from, to) of one pair. */
static void expand_pair(const struct lora_call *c, struct thread *t, const struct panel *p,
                        const float *hs, int64_t tile, int64_t s, int64_t from, int64_t to) {
    const struct slice *w = &c->slice[s];
    int64_t slot = entry(c->tile_slot, tile), start = entry(c->tile_start, tile);
    int64_t rows = entry(c->tile_rows, tile), rank = rank_of(c, s, slot);
    int64_t ldh = round_up(c->max_rank, LANES);
    const float *h = hs + ((start - p->first_row) * c->slices + s) * ldh;
    int64_t h_stride = c->slices * ldh;
    if (c->mode == MODE_EXPAND) {
        gather_tile(c, t, tile, s);
        h = t->tile;
        h_stride = ldh;
    }
    void *y[MAX_TILE_ROWS];
    for (int64_t m = 0; m < rows; m++) {
        int64_t token = entry(c->order, start + m);
        y[m] = token < c->tokens ? row_of(c->y, token, c->y_row_stride, (int)c->y_dtype) : NULL;
    }
    for (int64_t col = from; col < to; col += NB) {
        const void *bt = (const void *)w->b;
        int64_t bt_start = slot * w->b_slot_stride + col * w->b_row_stride;
        int64_t ldbt = w->b_col_stride, cols = min64(NB, to - col);
        int dtype = (int)c->weight_dtype;
        if (w->b_row_stride != 1) {
            transpose_columns(t->bt, bt, bt_start, w->b_row_stride, cols, rank, dtype);
            bt = t->bt, bt_start = 0, ldbt = NB, dtype = F32;
        }
        outer_columns(h, h_stride, rows, bt, bt_start, ldbt, rank, y,
                      c->y_offset + w->offset + col, cols, !c->overwrite, dtype, (int)c->y_dtype);
    }
}

static void run_shrink(const struct lora_call *c, struct thread *t, const struct panel *p,
                       float *hs) {
    int64_t total = 0, begin = 0, from, to;
    for (int64_t tile = p->first_tile; tile < p->last_tile; tile++)
        for (int64_t s = 0; s < c->slices; s++)
            total += cost_of(c, tile, rank_of(c, s, entry(c->tile_slot, tile)), 1);
    for (int64_t tile = p->first_tile; tile < p->last_tile; tile++)
        for (int64_t s = 0; s < c->slices; s++) {
            int64_t rank = rank_of(c, s, entry(c->tile_slot, tile));
            int64_t cost = cost_of(c, tile, rank, 1);
            share_of(t, total, begin, cost, rank, RANK_STEP, &from, &to);
            if (from < to) shrink_pair(c, t, p, hs, tile, s, from, to);
            begin += cost;
        }
}

static void run_expand(const struct lora_call *c, struct thread *t, const struct panel *p,
                       const float *hs) {
    int64_t total = 0, begin = 0, from, to;
    for (int64_t tile = p->first_tile; tile < p->last_tile; tile++)
        for (int64_t s = 0; s < c->slices; s++)
            total += cost_of(c, tile, rank_of(c, s, entry(c->tile_slot, tile)), c->slice[s].cols);
    for (int64_t tile = p->first_tile; tile < p->last_tile; tile++)
        for (int64_t s = 0; s < c->slices; s++) {
            int64_t cols = c->slice[s].cols, rank = rank_of(c, s, entry(c->tile_slot, tile));
            int64_t cost = cost_of(c, tile, rank, cols);
            share_of(t, total, begin, cost, cols, NB, &from, &to);
            if (from < to && (rank > 0 || c->overwrite)) expand_pair(c, t, p, hs, tile, s, from, to);
            begin += cost;
        }
}

/* Rows that no adapter covers, where the caller asked for y = delta (or for a whole h). */
static void run_zero(const struct lora_call *c, const struct thread *t) {
    int64_t tokens = entry(c->plan, PLAN_TOKENS);
    for (int64_t row = entry(c->plan, PLAN_ROWS) + t->index; row < tokens; row += t->count) {
        int64_t token = entry(c->order, row);
        if (token >= c->tokens) continue;
        for (int64_t s = 0; s < c->slices; s++) {
            const struct slice *w = &c->slice[s];
            if (c->mode == MODE_SHRINK)
                zero_span((void *)c->h, s * c->h_slice_stride + token * c->h_row_stride,
                          c->max_rank, (int)c->h_dtype);
            else
                zero_span((void *)c->y, token * c->y_row_stride + c->y_offset + w->offset, w->cols,
                          (int)c->y_dtype);
        }
    }
}

static int64_t shared_floats(int64_t slices, int64_t max_rank) {
    return PANEL_ROWS * slices * round_up(max_rank, LANES);
}

static int64_t thread_floats(int64_t k, int64_t max_rank, int64_t tile_rows) {
    int64_t width = round_up(k > max_rank ? k : max_rank, LANES);
    return round_up(tile_rows * width + NB * round_up(max_rank, LANES), 16);
}

/* Floats of scratch that a call with these sizes needs. */
int64_t multilora_scratch_floats(int64_t k, int64_t slices, int64_t max_rank, int64_t tile_rows,
                                 int64_t threads) {
    return shared_floats(slices, max_rank) + threads * thread_floats(k, max_rank, tile_rows);
}

void multilora_run(const struct lora_call *c, int64_t tile_rows) {
    int64_t tiles = entry(c->plan, PLAN_TILES);
    int zero = (c->overwrite || c->mode == MODE_SHRINK) &&
               entry(c->plan, PLAN_ROWS) < entry(c->plan, PLAN_TOKENS);
    if (tiles == 0 && !zero) return;
    float *hs = (float *)c->scratch;
#pragma omp parallel num_threads((int)c->threads)
    {
        struct thread t = {.index = THREAD_INDEX, .count = THREAD_COUNT, .gathered = -1};
        t.tile = hs + shared_floats(c->slices, c->max_rank) +
                 t.index * thread_floats(c->k, c->max_rank, tile_rows);
        t.bt = t.tile + tile_rows * round_up(c->k > c->max_rank ? c->k : c->max_rank, LANES);
        struct panel p = {0};
        if (zero) run_zero(c, &t);
        while (p.last_tile < tiles) {
            int64_t rows = 0;
            p.first_tile = p.last_tile;
            p.first_row = entry(c->tile_start, p.first_tile);
            while (p.last_tile < tiles && rows + entry(c->tile_rows, p.last_tile) <= PANEL_ROWS)
                rows += entry(c->tile_rows, p.last_tile++);
            if (c->mode != MODE_EXPAND) {
                run_shrink(c, &t, &p, hs);
#pragma omp barrier
            }
            if (c->mode == MODE_SHRINK) {
                int64_t pairs = (p.last_tile - p.first_tile) * c->slices;
                for (int64_t i = t.index; i < pairs; i += t.count)
                    write_h(c, &p, hs, p.first_tile + i / c->slices, i % c->slices);
            } else {
                run_expand(c, &t, &p, hs);
            }
            if (p.last_tile < tiles && c->mode != MODE_EXPAND) {
#pragma omp barrier
            }
        }
    }
}
