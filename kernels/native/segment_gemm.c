/* Segment GEMM for CPUs: y[t] += (x[t] @ A[slot(t)]^T) @ B[slot(t)]^T, per run of tokens.
 *
 * The plan (multilora_kernels.plan) sorts a batch's tokens by adapter slot and cuts every
 * slot's run into tiles. A panel is a group of whole tiles with at most PANEL_ROWS rows; for
 * each panel three phases run, every phase split over the OpenMP threads:
 *
 *   gather   rows of x, in sorted order, widened to float32            -> xs [rows, K]
 *   shrink   dot products with the first r rows of A                    -> h  [slice, rows, R]
 *   expand   B transposed 16 columns at a time, then outer products     -> y  in place
 *
 * Only the first r = rank(slice, slot) rows of A and columns of B are read, so cost follows
 * the true ranks. Each output element is the sum of the same products in the same order
 * whatever the batch around it looks like: results are deterministic, and a row's bits do not
 * depend on the other rows.
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

#define LANES 8
#define NB 16          /* output columns transposed and kept at a time */
#define PANEL_ROWS 256 /* bounds the scratch memory: rows * (K + slices * R) floats */
#define RANK_UNIT 24   /* rows of A per work unit of the shrink phase */
#define COL_UNIT 64    /* output columns per work unit of the expand phase */
#define MAX_SLICES 16

typedef float f32v __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t u32v __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t u16v __attribute__((vector_size(2 * LANES), aligned(2)));

enum dtype { F32 = 0, BF16 = 1, F16 = 2 };

/* The plan buffer's header; must match plan.py. */
enum { PLAN_TOKENS = 0, PLAN_ROWS = 1, PLAN_RUNS = 2, PLAN_TILES = 3 };

enum mode { MODE_LINEAR = 0, MODE_SHRINK = 1, MODE_EXPAND = 2 };

struct slice {
    int64_t a, a_slot_stride, a_row_stride; /* address; strides in elements */
    int64_t b, b_slot_stride, b_row_stride;
    int64_t cols;   /* output columns N_i */
    int64_t offset; /* first output column in y */
    int64_t h, h_row_stride; /* this slice's buffer for the shrink and expand halves */
};

struct lora_call {
    int64_t mode, threads, slices;
    int64_t x, x_row_stride, x_dtype, k;
    int64_t y, y_row_stride, y_dtype;
    int64_t h_dtype, max_rank, weight_dtype;
    int64_t tokens;    /* rows of x (or h) and y; plan entries at or past it are skipped */
    int64_t overwrite; /* 1: y = delta instead of y += delta, also for rows without adapter */
    int64_t plan, order, tile_slot, tile_start, tile_rows;
    int64_t ranks, ranks_stride; /* int32 [slices, slots] */
    int64_t scratch;
    double scale;
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
    f32v acc[4][3];
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < ranks; n++) acc[m][n] = (f32v){0};
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES) {
        f32v w[3];
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
    for (; n + 3 <= ranks; n += 3)
        dot_block(rows, 3, x, ldx, a, a_start + n * lda, lda, k, scale, h + n, ldh, dtype);
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

/* ---- expand: NB columns of B, transposed once, against every row of the tile ---- */

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
INLINE void transpose_columns(float *bt, const void *b, int64_t b_start, int64_t ldb, int64_t rows,
                              int64_t rank, const int dtype) {
    for (int64_t j = 0; j < rank; j += LANES) {
        int64_t n = min64(LANES, rank - j);
        for (int half = 0; half < NB / LANES; half++) {
            f32v block[LANES];
            for (int i = 0; i < LANES; i++) {
                int64_t row = half * LANES + i;
                if (row >= rows) block[i] = (f32v){0};
                else if (n == LANES) block[i] = load(b, b_start + row * ldb + j, dtype);
                else block[i] = load_part(b, b_start + row * ldb + j, n, dtype);
            }
            transpose8(block);
            for (int i = 0; i < n; i++) store(bt, (j + i) * NB + half * LANES, block[i], F32);
        }
    }
}

INLINE void outer_rows(const int rows, const float *h, int64_t ldh, const float *bt, int64_t rank,
                       char *const *y, int64_t col, int64_t cols, int add, const int y_dtype) {
    f32v acc[6][2];
    for (int m = 0; m < rows; m++) acc[m][0] = acc[m][1] = (f32v){0};
    for (int64_t j = 0; j < rank; j++) {
        f32v b0 = load(bt, j * NB, F32), b1 = load(bt, j * NB + LANES, F32);
        for (int m = 0; m < rows; m++) {
            f32v v = broadcast(h[m * ldh + j]);
            acc[m][0] = mul_add(v, b0, acc[m][0]);
            acc[m][1] = mul_add(v, b1, acc[m][1]);
        }
    }
    for (int m = 0; m < rows; m++) {
        if (!y[m]) continue;
        for (int half = 0; half < 2; half++) {
            int64_t n = cols - half * LANES, at = col + half * LANES;
            f32v v = acc[m][half];
            if (n >= LANES) {
                if (add) v += load(y[m], at, y_dtype);
                store(y[m], at, v, y_dtype);
            } else if (n > 0) {
                if (add) v += load_part(y[m], at, n, y_dtype);
                store_part(y[m], at, n, v, y_dtype);
            }
        }
    }
}

INLINE void outer_typed(const float *h, int64_t ldh, int64_t rows, const float *bt, int64_t rank,
                        char *const *y, int64_t col, int64_t cols, int add, const int y_dtype) {
    int64_t m = 0;
    for (; m + 6 <= rows; m += 6)
        outer_rows(6, h + m * ldh, ldh, bt, rank, y + m, col, cols, add, y_dtype);
    if (m + 4 <= rows) {
        outer_rows(4, h + m * ldh, ldh, bt, rank, y + m, col, cols, add, y_dtype);
        m += 4;
    }
    if (m + 2 <= rows) {
        outer_rows(2, h + m * ldh, ldh, bt, rank, y + m, col, cols, add, y_dtype);
        m += 2;
    }
    if (m < rows) outer_rows(1, h + m * ldh, ldh, bt, rank, y + m, col, cols, add, y_dtype);
}

static void expand_unit(const float *h, int64_t ldh, int64_t rows, const void *b, int64_t b_start,
                        int64_t ldb, int64_t rank, float *bt, char *const *y, int64_t col,
                        int64_t cols, int add, int dtype, int y_dtype) {
    if (dtype == F32) transpose_columns(bt, b, b_start, ldb, cols, rank, F32);
    else if (dtype == BF16) transpose_columns(bt, b, b_start, ldb, cols, rank, BF16);
    else transpose_columns(bt, b, b_start, ldb, cols, rank, F16);
    if (y_dtype == F32) outer_typed(h, ldh, rows, bt, rank, y, col, cols, add, F32);
    else if (y_dtype == BF16) outer_typed(h, ldh, rows, bt, rank, y, col, cols, add, BF16);
    else outer_typed(h, ldh, rows, bt, rank, y, col, cols, add, F16);
}

/* ---- the phases over one panel; each is a work-shared loop inside one parallel region ---- */

struct panel {
    int64_t first_tile, last_tile; /* tiles [first, last) */
    int64_t first_row, rows;       /* rows in sorted order */
};

INLINE int rank_of(const struct lora_call *c, int64_t slice, int64_t slot) {
    return ((const int32_t *)c->ranks)[slice * c->ranks_stride + slot];
}

static void zero_span(void *base, int64_t index, int64_t n, int dtype) {
    memset((char *)base + (size_t)index * width_of(dtype), 0, (size_t)n * width_of(dtype));
}

static void run_gather(const struct lora_call *c, const struct panel *p, float *xs, float *hs) {
    const int32_t *order = (const int32_t *)c->order;
    int64_t ldx = round_up(c->k, LANES), ldh = round_up(c->max_rank, LANES);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < p->rows; row++) {
        int64_t token = order[p->first_row + row];
        if (token >= c->tokens) continue;
        if (c->mode == MODE_EXPAND) {
            for (int64_t s = 0; s < c->slices; s++)
                gather_row(hs + (s * PANEL_ROWS + row) * ldh, (const void *)c->slice[s].h,
                           token * c->slice[s].h_row_stride, c->max_rank, (int)c->h_dtype);
        } else {
            gather_row(xs + row * ldx, (const void *)c->x, token * c->x_row_stride, c->k,
                       (int)c->x_dtype);
        }
    }
}

static void run_shrink(const struct lora_call *c, const struct panel *p, const float *xs,
                       float *hs) {
    const int32_t *tile_slot = (const int32_t *)c->tile_slot;
    const int32_t *tile_start = (const int32_t *)c->tile_start;
    const int32_t *tile_rows = (const int32_t *)c->tile_rows;
    int64_t ldx = round_up(c->k, LANES), ldh = round_up(c->max_rank, LANES);
    int64_t per_slice = (c->max_rank + RANK_UNIT - 1) / RANK_UNIT, per_tile = per_slice * c->slices;
    int64_t units = (p->last_tile - p->first_tile) * per_tile;
#pragma omp for schedule(dynamic, 1)
    for (int64_t unit = 0; unit < units; unit++) {
        int64_t tile = p->first_tile + unit / per_tile;
        int64_t s = unit % per_tile / per_slice, first = unit % per_slice * RANK_UNIT;
        int64_t slot = tile_slot[tile], row = tile_start[tile] - p->first_row;
        int64_t ranks = min64(RANK_UNIT, rank_of(c, s, slot) - first);
        if (ranks <= 0) continue;
        const struct slice *w = &c->slice[s];
        shrink_unit(xs + row * ldx, ldx, tile_rows[tile], (const void *)w->a,
                    slot * w->a_slot_stride + first * w->a_row_stride, w->a_row_stride, c->k, ranks,
                    (float)c->scale, hs + (s * PANEL_ROWS + row) * ldh + first, ldh,
                    (int)c->weight_dtype);
    }
}

static void run_expand(const struct lora_call *c, const struct panel *p, const float *hs) {
    const int32_t *order = (const int32_t *)c->order;
    const int32_t *tile_slot = (const int32_t *)c->tile_slot;
    const int32_t *tile_start = (const int32_t *)c->tile_start;
    const int32_t *tile_rows = (const int32_t *)c->tile_rows;
    int64_t ldh = round_up(c->max_rank, LANES), per_tile = 0;
    int64_t first_unit[MAX_SLICES + 1];
    for (int64_t s = 0; s < c->slices; s++) {
        first_unit[s] = per_tile;
        per_tile += (c->slice[s].cols + COL_UNIT - 1) / COL_UNIT;
    }
    first_unit[c->slices] = per_tile;
    float bt[NB * ldh] __attribute__((aligned(64)));
#pragma omp for schedule(dynamic, 1)
    for (int64_t unit = 0; unit < (p->last_tile - p->first_tile) * per_tile; unit++) {
        int64_t tile = p->first_tile + unit / per_tile, within = unit % per_tile, s = 0;
        while (within >= first_unit[s + 1]) s++;
        const struct slice *w = &c->slice[s];
        int64_t slot = tile_slot[tile], start = tile_start[tile], rows = tile_rows[tile];
        int64_t rank = rank_of(c, s, slot);
        int64_t col = (within - first_unit[s]) * COL_UNIT, end = min64(w->cols, col + COL_UNIT);
        if (rank <= 0 && !c->overwrite) continue;
        char *y[PANEL_ROWS];
        for (int64_t m = 0; m < rows; m++) {
            int64_t token = order[start + m];
            y[m] = token < c->tokens ? (char *)c->y + (size_t)(token * c->y_row_stride) *
                                                          width_of((int)c->y_dtype)
                                     : NULL;
        }
        for (; col < end; col += NB)
            expand_unit(hs + (s * PANEL_ROWS + start - p->first_row) * ldh, ldh, rows,
                        (const void *)w->b, slot * w->b_slot_stride + col * w->b_row_stride,
                        w->b_row_stride, rank, bt, y, w->offset + col, min64(NB, w->cols - col),
                        !c->overwrite, (int)c->weight_dtype, (int)c->y_dtype);
    }
}

/* Shrink alone: h[slice][token] = products, then zeros up to the buffer's width. */
static void run_scatter(const struct lora_call *c, const struct panel *p, const float *hs) {
    const int32_t *order = (const int32_t *)c->order;
    const int32_t *tile_slot = (const int32_t *)c->tile_slot;
    const int32_t *tile_start = (const int32_t *)c->tile_start;
    const int32_t *tile_rows = (const int32_t *)c->tile_rows;
    int64_t ldh = round_up(c->max_rank, LANES);
#pragma omp for schedule(static)
    for (int64_t tile = p->first_tile; tile < p->last_tile; tile++)
        for (int64_t m = 0; m < tile_rows[tile]; m++) {
            int64_t row = tile_start[tile] + m, token = order[row];
            if (token >= c->tokens) continue;
            for (int64_t s = 0; s < c->slices; s++) {
                const float *from = hs + (s * PANEL_ROWS + row - p->first_row) * ldh;
                int64_t rank = rank_of(c, s, tile_slot[tile]), i = 0;
                int64_t to = token * c->slice[s].h_row_stride;
                void *h = (void *)c->slice[s].h;
                for (; i + LANES <= rank; i += LANES)
                    store(h, to + i, load(from, i, F32), (int)c->h_dtype);
                if (i < rank)
                    store_part(h, to + i, rank - i, load_part(from, i, rank - i, F32),
                               (int)c->h_dtype);
                zero_span(h, to + rank, c->max_rank - rank, (int)c->h_dtype);
            }
        }
}

/* Rows that no adapter covers, where the caller asked for y = delta (or a whole h). */
static void run_zero(const struct lora_call *c) {
    const int32_t *plan = (const int32_t *)c->plan, *order = (const int32_t *)c->order;
#pragma omp for schedule(static)
    for (int64_t row = plan[PLAN_ROWS]; row < plan[PLAN_TOKENS]; row++) {
        int64_t token = order[row];
        if (token >= c->tokens) continue;
        for (int64_t s = 0; s < c->slices; s++) {
            const struct slice *w = &c->slice[s];
            if (c->mode == MODE_SHRINK)
                zero_span((void *)w->h, token * w->h_row_stride, c->max_rank, (int)c->h_dtype);
            else
                zero_span((void *)c->y, token * c->y_row_stride + w->offset, w->cols,
                          (int)c->y_dtype);
        }
    }
}

/* Floats of scratch that a call with these sizes needs. */
int64_t multilora_scratch_floats(int64_t k, int64_t slices, int64_t max_rank) {
    return PANEL_ROWS * (round_up(k, LANES) + slices * round_up(max_rank, LANES));
}

void multilora_run(const struct lora_call *c) {
    const int32_t *plan = (const int32_t *)c->plan;
    const int32_t *tile_start = (const int32_t *)c->tile_start;
    const int32_t *tile_rows = (const int32_t *)c->tile_rows;
    int64_t tiles = plan[PLAN_TILES];
    int64_t zero = (c->overwrite || c->mode == MODE_SHRINK) && plan[PLAN_ROWS] < plan[PLAN_TOKENS];
    if (tiles == 0 && !zero) return;
    float *xs = (float *)c->scratch;
    float *hs = xs + (c->mode == MODE_EXPAND ? 0 : PANEL_ROWS * round_up(c->k, LANES));
#pragma omp parallel num_threads((int)c->threads)
    {
        struct panel p = {0};
        if (zero) run_zero(c);
        while (p.last_tile < tiles) {
            p.first_tile = p.last_tile;
            p.first_row = tile_start[p.first_tile];
            p.rows = 0;
            while (p.last_tile < tiles && p.rows + tile_rows[p.last_tile] <= PANEL_ROWS)
                p.rows += tile_rows[p.last_tile++];
            run_gather(c, &p, xs, hs);
            if (c->mode != MODE_EXPAND) run_shrink(c, &p, xs, hs);
            if (c->mode == MODE_SHRINK) run_scatter(c, &p, hs);
            else run_expand(c, &p, hs);
        }
    }
}
