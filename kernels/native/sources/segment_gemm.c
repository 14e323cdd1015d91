/* Segment GEMM for CPUs: y[t] += (x[t] @ A[slot(t)]^T) @ B[slot(t)]^T, per run of tokens.
 *
 * The plan (multilora_kernels.plan) sorts a batch's tokens by adapter slot and cuts every
 * slot's run into tiles. A panel is a group of whole tiles with at most PANEL_ROWS rows. Each
 * panel takes two phases, with a barrier between them:
 *
 *   shrink   h[row, slice, :r] = dot products of the row of x with the first r rows of A
 *   expand   y[row] += sum over j < r of h[row, slice, j] * column j of B, then the adapter's
 *            factors of y's columns, if it has any
 *
 * A phase's work is the list of (tile, slice) pairs, each with a cost that follows from its
 * rows, its true rank and the slice's width. Every thread takes one contiguous share of the
 * total cost, cutting pairs by rank or column where a share ends: no queue, no atomics, and one
 * adapter with many tokens is shared between threads as well as many adapters with one each.
 * Reading the weights takes most of the time where an adapter has few tokens; they are fetched
 * some KiB before they are read, across the ends of pieces.
 *
 * Only the first r = rank(slice, slot) rows of A and columns of B are read, so time follows
 * the true ranks. B's columns are contiguous if the caller stores it so (b_col_stride == 1,
 * r whole columns are streamed); if its rows are, blocks of it are transposed on the way.
 *
 * On processors that multiply bfloat16, h is rounded to it before it meets a B and a y of that type.
 *
 * Each output element is the sum of the same products in the same order whatever the batch,
 * the layout of B or the number of threads: a row's bits do not depend on the other rows.
 *
 * abi.h says how it is called.
 */
#include "dot_products.h"
#include "outer_products.h"
#include "threads.h"
#include "word_products.h"

#define PANEL_ROWS 256 /* bounds the memory for h: rows * slices * R floats */
#define MAX_TILE_ROWS 256

const int64_t multilora_call_bytes = sizeof(struct lora_call);

/* Whether a phase multiplies bfloat16 as it is, adding to float32, for activations of this type. */
INLINE int multiplies_as_bf16(const struct lora_call *c, int64_t activations) {
#if defined(__AVX512BF16__)
    return c->weight_dtype == BF16 && activations == BF16;
#else
    (void)c, (void)activations;
    return 0;
#endif
}

/* ---- a thread's share of a phase ---- */

struct panel {
    int64_t first_tile, last_tile; /* tiles [first, last) */
    int64_t first_row;             /* in the plan's order */
    float *h;                      /* of its rows, [row][slice][rank] */
};

/* A phase of a panel, of which a thread takes its share piece by piece. */
struct phase {
    int expands;
    int64_t total, begin; /* cost of all pairs, and of those before the next one */
    int64_t tile, slice;  /* the next one */
};

/* A part of a pair that one thread computes: ranks, or columns, [from, to). */
struct piece {
    int64_t tile, slice, from, to;
};

struct thread {
    int64_t index, count;
    float *tile; /* own scratch: a tile's rows of x or h, as they are multiplied */
    float *bt;   /* own scratch: some columns of B, in the order in which they are multiplied */
    int64_t gathered; /* which rows `tile` holds, to gather them once; -1 for none */
    struct fetching fetching;
    struct phase phase, following; /* whose pieces' weights are still to be fetched */
    struct piece piece;            /* the same of what is left of it */
};

INLINE int64_t rank_of(const struct lora_call *c, int64_t slice, int64_t slot) {
    return ((const int32_t *)c->ranks)[slice * c->ranks_stride + slot * c->ranks_slot_stride];
}

INLINE int32_t entry(int64_t table, int64_t index) { return ((const int32_t *)table)[index]; }

/* A field of a tile's record in the plan. */
INLINE int32_t of_tile(int64_t field, int64_t tile) { return entry(field, TILE_INTS * tile); }

INLINE void *row_of(int64_t base, int64_t row, int64_t stride, int dtype) {
    return (char *)base + (size_t)(row * stride) * width_of(dtype);
}

/* Where a tile's h begins in a panel, for a slice; its next row is `slices` rows of h on. */
INLINE float *h_of(const struct lora_call *c, const struct panel *p, int64_t tile, int64_t slice) {
    int64_t row = of_tile(c->tile_start, tile) - p->first_row;
    return p->h + (row * c->slices + slice) * round_up(c->max_rank, PAIR);
}

/* Where a token's h for a slice begins in the caller's h. */
INLINE int64_t in_callers_h(const struct lora_call *c, int64_t token, int64_t slice) {
    return slice * c->h_slice_stride + token * c->h_row_stride;
}

static void zero_span(void *base, int64_t index, int64_t n, int dtype) {
    memset((char *)base + (size_t)index * width_of(dtype), 0, (size_t)n * width_of(dtype));
}

/* How sums of a slice's columns are put into y for a slot. */
INLINE struct onto onto_of(const struct lora_call *c, int64_t slice, int64_t slot) {
    struct onto onto = {!c->overwrite, NULL, NULL};
    if (c->factors && ((const int32_t *)c->marks)[slice * c->marks_stride + slot]) {
        int64_t offset = c->slice[slice].offset;
        onto.factor = (const float *)c->factors + slot * c->factors_stride + offset;
        if (c->bias) onto.bias = (const float *)c->bias + offset;
    }
    return onto;
}

/* Cost of a pair: weights are read once and used for every row; 4 stands for the reading. */
INLINE int64_t cost_of(const struct lora_call *c, int64_t tile, int64_t rank, int64_t width) {
    return (rank + 1) * width * (4 + of_tile(c->tile_rows, tile));
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

/* Row m of the tile: a token's x, as the dot products want it. */
static void gather_x(const struct lora_call *c, float *tile, int64_t m, int64_t token) {
    int64_t from = token * c->x_row_stride, padded = round_up(c->k, PAIR);
    if (multiplies_as_bf16(c, c->x_dtype)) {
        uint16_t *row = (uint16_t *)tile + m * padded;
        memcpy(row, (const uint16_t *)c->x + from, (size_t)c->k * sizeof *row);
        memset(row + c->k, 0, (size_t)(padded - c->k) * sizeof *row);
    } else {
        gather_row(tile + m * padded, (const void *)c->x, from, c->k, (int)c->x_dtype,
                   c->weight_dtype == BF16);
    }
}

static void gather_tile(const struct lora_call *c, struct thread *t, int64_t tile, int64_t slice) {
    int64_t key = c->mode == MODE_EXPAND ? tile * c->slices + slice : tile;
    if (t->gathered == key) return;
    t->gathered = key;
    int64_t start = of_tile(c->tile_start, tile), rows = of_tile(c->tile_rows, tile);
    for (int64_t m = 0; m < rows; m++) {
        int64_t token = entry(c->order, start + m);
        if (token >= c->tokens) continue;
        if (c->mode == MODE_EXPAND)
            gather_row(t->tile + m * round_up(c->max_rank, PAIR), (const void *)c->h,
                       in_callers_h(c, token, slice), c->max_rank, (int)c->h_dtype, 0);
        else
            gather_x(c, t->tile, m, token);
    }
}

static int64_t cost_in(const struct lora_call *c, const struct phase *phase, int64_t tile,
                       int64_t s) {
    int64_t rank = rank_of(c, s, of_tile(c->tile_slot, tile));
    return cost_of(c, tile, rank, phase->expands ? c->slice[s].cols : 1);
}

static struct phase phase_of(const struct lora_call *c, const struct panel *p, int expands) {
    struct phase phase = {.expands = expands, .tile = p->first_tile};
    for (int64_t tile = p->first_tile; tile < p->last_tile; tile++)
        for (int64_t s = 0; s < c->slices; s++) phase.total += cost_in(c, &phase, tile, s);
    return phase;
}

/* This thread's next piece; 0 if there is none. */
static int next_piece(const struct lora_call *c, const struct thread *t, const struct panel *p,
                      struct phase *phase, struct piece *piece) {
    while (phase->tile < p->last_tile) {
        int64_t tile = phase->tile, s = phase->slice, cost = cost_in(c, phase, tile, s);
        int64_t rank = rank_of(c, s, of_tile(c->tile_slot, tile));
        piece->tile = tile, piece->slice = s;
        share_of(t, phase->total, phase->begin, cost, phase->expands ? c->slice[s].cols : rank,
                 phase->expands ? NB : RANK_STEP, &piece->from, &piece->to);
        phase->begin += cost;
        if (++phase->slice == c->slices) phase->slice = 0, phase->tile++;
        if (piece->from < piece->to && (!phase->expands || rank > 0 || c->overwrite)) return 1;
    }
    return 0;
}

/* How many of a piece's columns of B are streamed at a time; 0 if none, because there are many rows or
 * a column is not contiguous. */
static int64_t columns_streamed(const struct lora_call *c, const struct piece *piece) {
    int64_t rows = of_tile(c->tile_rows, piece->tile);
    int64_t rank = rank_of(c, piece->slice, of_tile(c->tile_slot, piece->tile));
    if (rank == 0 || c->slice[piece->slice].b_row_stride != 1) return 0;
#if defined(__AVX512BF16__)
    if (multiplies_as_bf16(c, c->y_dtype))
        return rows <= STREAMED_WORD_ROWS ? streamed_columns(rows) : 0;
#endif
    return rows <= STREAMED_ROWS ? STREAMED_COLUMNS : 0;
}

/* The weights that are read next of a piece, which is left without them. */
static struct region region_of(const struct lora_call *c, struct piece *piece, int expands) {
    const struct slice *w = &c->slice[piece->slice];
    int64_t slot = of_tile(c->tile_slot, piece->tile), width = (int64_t)width_of((int)c->weight_dtype);
    struct region r;
    if (expands) {
        int64_t streamed = columns_streamed(c, piece), cols = piece->to - piece->from;
        if (streamed) cols = min64(streamed, cols); /* others are not fetched */
        r.start = (const char *)w->b + (slot * w->b_slot_stride + piece->from) * width;
        r.run = cols * width, r.stride = w->b_col_stride * width;
        r.runs = streamed ? rank_of(c, piece->slice, slot) : 0;
        piece->from += cols;
    } else {
        r.start = (const char *)w->a + (slot * w->a_slot_stride + piece->from * w->a_row_stride) * width;
        r.run = c->k * width, r.stride = w->a_row_stride * width, r.runs = piece->to - piece->from;
        piece->from = piece->to;
    }
    if (r.run == r.stride) r.run *= r.runs, r.runs = min64(r.runs, 1);
    return r;
}

/* Learns what weights the thread will read. */
static void look_ahead(const struct lora_call *c, struct thread *t, const struct panel *p) {
    struct fetching *f = &t->fetching;
    while (f->known - f->next < REGIONS) {
        if (t->piece.from == t->piece.to && !next_piece(c, t, p, &t->phase, &t->piece)) {
            if (t->phase.expands == t->following.expands) return;
            t->phase = t->following;
            continue;
        }
        struct region region = region_of(c, &t->piece, t->phase.expands);
        if (region.runs) f->ring[f->known++ % REGIONS] = region;
    }
}

/* Begins to fetch what the phases will read. */
static void begin_to_fetch(const struct lora_call *c, struct thread *t, const struct panel *p,
                           struct phase first, struct phase last) {
    t->fetching = (struct fetching){0};
    t->phase = first, t->following = last;
    t->piece = (struct piece){0};
    look_ahead(c, t, p);
    for (int64_t i = 0; t->fetching.known && i < FETCHED_AHEAD; i += CACHE_LINE)
        fetch(&t->fetching, CACHE_LINE);
}

/* How many tokens a tile's rows are apart, if all alike; 0 if not, or if some have no activations. */
static int64_t tokens_apart(const struct lora_call *c, int64_t start, int64_t rows) {
    int64_t first = entry(c->order, start), apart = 1;
    if (rows > 1) apart = entry(c->order, start + 1) - first;
    for (int64_t m = 0; m < rows; m++) {
        int64_t token = entry(c->order, start + m);
        if (token != first + m * apart || token >= c->tokens) return 0;
    }
    return apart;
}

/* A piece of the shrink phase, into the panel's h. */
static void shrink_piece(const struct lora_call *c, struct thread *t, const struct panel *p,
                         const struct piece *piece) {
    const struct slice *w = &c->slice[piece->slice];
    int64_t start = of_tile(c->tile_start, piece->tile), rows = of_tile(c->tile_rows, piece->tile);
    int64_t ldh = round_up(c->max_rank, PAIR), ldx = round_up(c->k, PAIR);
    int64_t slot = of_tile(c->tile_slot, piece->tile);
    int as_bf16 = multiplies_as_bf16(c, c->x_dtype);
    int64_t apart = as_bf16 && c->k % PAIR == 0 ? tokens_apart(c, start, rows) : 0;
    const void *x = t->tile;
    if (apart) { /* as they lie: the rows of a prompt, or of one or two requests */
        x = row_of(c->x, entry(c->order, start), c->x_row_stride, BF16);
        ldx = apart * c->x_row_stride;
    } else {
        gather_tile(c, t, piece->tile, piece->slice);
    }
    shrink_function *shrink = shrink_rows[c->weight_dtype];
#if defined(__AVX512BF16__)
    if (as_bf16) shrink = shrink_BF16_BF16;
#endif
    struct dots d = {
        .x = x,
        .ldx = ldx,
        .a = (const void *)w->a,
        .a_start = slot * w->a_slot_stride + piece->from * w->a_row_stride,
        .lda = w->a_row_stride,
        .k = c->k,
        .ranks = piece->to - piece->from,
        .fetching = &t->fetching,
        .scale = (float)c->scale,
        .h = h_of(c, p, piece->tile, piece->slice) + piece->from,
        .ldh = c->slices * ldh,
    };
    shrink(d, rows);
}

/* A tile's h for a slice, from the panel's into the caller's. */
static void write_h(const struct lora_call *c, const struct panel *p, int64_t tile, int64_t s) {
    int64_t start = of_tile(c->tile_start, tile), ldh = round_up(c->max_rank, PAIR);
    int64_t rank = rank_of(c, s, of_tile(c->tile_slot, tile));
    for (int64_t m = 0; m < of_tile(c->tile_rows, tile); m++) {
        int64_t token = entry(c->order, start + m), i = 0;
        if (token >= c->tokens) continue;
        const float *from = h_of(c, p, tile, s) + m * c->slices * ldh;
        int64_t to = in_callers_h(c, token, s);
        for (; i + LANES <= rank; i += LANES)
            store((void *)c->h, to + i, load(from, i, F32), (int)c->h_dtype);
        if (i < rank)
            store_part((void *)c->h, to + i, rank - i, load_part(from, i, rank - i, F32),
                       (int)c->h_dtype);
        zero_span((void *)c->h, to + rank, c->max_rank - rank, (int)c->h_dtype);
    }
}

/* A piece of the expand phase, as both ways to multiply see it. */
struct expansion {
    const struct piece *piece;
    int64_t rows, rank;
    int64_t b_start; /* of the slot, in the slice's B */
    int64_t streamed; /* how many of B's columns at a time, as they lie in memory; 0: none */
    void *const *y;       /* rows; NULL for those without activations */
    int64_t first_column; /* of the slice, in y */
    struct onto onto;     /* from that column on */
};

static void expand_floats(const struct lora_call *c, struct thread *t, const struct panel *p,
                          const struct expansion *e) {
    const struct slice *w = &c->slice[e->piece->slice];
    const void *b = (const void *)w->b;
    const float *h = t->tile;
    int64_t ldh = round_up(c->max_rank, PAIR), from = e->piece->from, to = e->piece->to;
    if (c->mode == MODE_EXPAND) {
        gather_tile(c, t, e->piece->tile, e->piece->slice);
    } else {
        h = h_of(c, p, e->piece->tile, e->piece->slice);
        ldh *= c->slices;
    }
    for (int64_t col = from, step = e->streamed ? e->streamed : NB; col < to; col += step) {
        int64_t at = e->b_start + col * w->b_row_stride, cols = min64(step, to - col);
        struct onto onto = onto_column(e->onto, col);
        if (e->streamed) {
            stream_columns[c->weight_dtype][c->y_dtype](h, ldh, e->rows, b, at, w->b_col_stride,
                                                        e->rank, e->y, e->first_column + col, cols,
                                                        onto, &t->fetching);
        } else if (w->b_row_stride == 1) {
            outer_columns[c->weight_dtype][c->y_dtype](h, ldh, e->rows, b, at, w->b_col_stride,
                                                       e->rank, e->y, e->first_column + col, cols,
                                                       onto);
        } else {
            transpose_columns(t->bt, b, at, w->b_row_stride, cols, e->rank, (int)c->weight_dtype);
            outer_columns[F32][c->y_dtype](h, ldh, e->rows, t->bt, 0, NB, e->rank, e->y,
                                           e->first_column + col, cols, onto);
        }
    }
}

#if defined(__AVX512BF16__)
static void expand_words(const struct lora_call *c, struct thread *t, const struct panel *p,
                         const struct expansion *e) {
    const struct slice *w = &c->slice[e->piece->slice];
    const void *b = (const void *)w->b;
    int64_t tile = e->piece->tile, slice = e->piece->slice, from = e->piece->from,
            to = e->piece->to, start = of_tile(c->tile_start, tile),
            ldh = round_up(c->max_rank, PAIR), ldw = ldh / 2;
    uint32_t *h = (uint32_t *)t->tile, *words = (uint32_t *)t->bt;
    t->gathered = -1;
    for (int64_t m = 0; m < e->rows; m++) {
        int64_t token = entry(c->order, start + m);
        if (c->mode != MODE_EXPAND)
            words_of_h(h + m * ldw, h_of(c, p, tile, slice), m * c->slices * ldh, e->rank, F32);
        else if (token < c->tokens)
            words_of_h(h + m * ldw, (const void *)c->h, in_callers_h(c, token, slice), e->rank,
                       (int)c->h_dtype);
    }
    int64_t step = e->streamed ? e->streamed : NB;
    for (int64_t col = from; col < to; col += step) {
        int64_t at = e->b_start + col * w->b_row_stride, cols = min64(step, to - col);
        struct onto onto = onto_column(e->onto, col);
        if (e->streamed) {
            struct stream s = {h, ldw, b, at, w->b_col_stride, e->rank, e->y,
                               e->first_column + col, cols, onto, &t->fetching};
            stream_words(&s, e->rows);
        } else {
            words_of_columns(words, b, at, w->b_row_stride, w->b_col_stride, cols, e->rank);
            word_columns(h, ldw, e->rows, words, e->rank, e->y, e->first_column + col, cols, onto);
        }
    }
}
#endif

/* A piece of the expand phase. */
static void expand_piece(const struct lora_call *c, struct thread *t, const struct panel *p,
                         const struct piece *piece) {
    const struct slice *w = &c->slice[piece->slice];
    int64_t slot = of_tile(c->tile_slot, piece->tile), start = of_tile(c->tile_start, piece->tile);
    int64_t rows = of_tile(c->tile_rows, piece->tile), rank = rank_of(c, piece->slice, slot);
    void *y[MAX_TILE_ROWS];
    struct expansion e = {
        .piece = piece,
        .rows = rows,
        .rank = rank,
        .b_start = slot * w->b_slot_stride,
        .streamed = columns_streamed(c, piece),
        .y = y,
        .first_column = c->y_offset + w->offset,
        .onto = onto_of(c, piece->slice, slot),
    };
    for (int64_t m = 0; m < rows; m++) {
        int64_t token = entry(c->order, start + m);
        y[m] = token < c->tokens ? row_of(c->y, token, c->y_row_stride, (int)c->y_dtype) : NULL;
        fetch_columns(y[m], e.first_column + piece->from, NB, (int)c->y_dtype);
    }
#if defined(__AVX512BF16__)
    if (multiplies_as_bf16(c, c->y_dtype)) {
        expand_words(c, t, p, &e);
        return;
    }
#endif
    expand_floats(c, t, p, &e);
}

static void run_phase(const struct lora_call *c, struct thread *t, const struct panel *p,
                      struct phase phase) {
    struct piece piece;
    while (next_piece(c, t, p, &phase, &piece)) {
        look_ahead(c, t, p);
        (phase.expands ? expand_piece : shrink_piece)(c, t, p, &piece);
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
    return PANEL_ROWS * slices * round_up(max_rank, PAIR);
}

/* Of each thread: a tile's rows of x or h, ... */
static int64_t tile_floats(const struct lora_call *c) {
    return c->longest_tile * round_up(c->k > c->max_rank ? c->k : c->max_rank, PAIR);
}

/* ... and these and some columns of B. */
static int64_t thread_floats(const struct lora_call *c) {
    return round_up(tile_floats(c) + NB * round_up(c->max_rank, PAIR), 16);
}

int64_t multilora_scratch_floats(const struct lora_call *c, int64_t threads) {
    return shared_floats(c->slices, c->max_rank) + threads * thread_floats(c);
}

void multilora_run(const struct lora_call *c) {
    int64_t tiles = entry(c->plan, PLAN_TILES);
    int zero = (c->overwrite || c->mode == MODE_SHRINK) &&
               entry(c->plan, PLAN_ROWS) < entry(c->plan, PLAN_TOKENS);
    if (tiles == 0 && !zero) return;
#pragma omp parallel num_threads((int)c->threads)
    {
        struct thread t = {.index = THREAD_INDEX, .count = THREAD_COUNT, .gathered = -1};
        struct panel p = {.h = (float *)c->scratch};
        t.tile = p.h + shared_floats(c->slices, c->max_rank) + t.index * thread_floats(c);
        t.bt = t.tile + tile_floats(c);
        if (zero) run_zero(c, &t);
        while (p.last_tile < tiles) {
            int64_t rows = 0;
            p.first_tile = p.last_tile;
            p.first_row = of_tile(c->tile_start, p.first_tile);
            while (p.last_tile < tiles && rows + of_tile(c->tile_rows, p.last_tile) <= PANEL_ROWS)
                rows += of_tile(c->tile_rows, p.last_tile++);
            struct phase shrink = phase_of(c, &p, 0), expand = phase_of(c, &p, 1);
            begin_to_fetch(c, &t, &p, c->mode == MODE_EXPAND ? expand : shrink,
                           c->mode == MODE_SHRINK ? shrink : expand);
            if (c->mode != MODE_EXPAND) {
                run_phase(c, &t, &p, shrink);
#pragma omp barrier
            }
            if (c->mode == MODE_SHRINK) {
                int64_t pairs = (p.last_tile - p.first_tile) * c->slices;
                for (int64_t i = t.index; i < pairs; i += t.count)
                    write_h(c, &p, p.first_tile + i / c->slices, i % c->slices);
            } else {
                run_phase(c, &t, &p, expand);
            }
            if (p.last_tile < tiles && c->mode != MODE_EXPAND) {
#pragma omp barrier
            }
        }
    }
}
