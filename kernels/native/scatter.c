/* Copies parts of a packed adapter into a slot: many matrices in one call.
 *
 * The bytes of all pieces are one long line, of which each thread copies one contiguous share.
 * A piece whose rows follow each other in the slot too is cut anywhere, another between rows.
 */
#include "abi.h"
#include "streaming.h"

#if defined(_OPENMP)
int omp_get_thread_num(void);
int omp_get_num_threads(void);
#define THREAD_INDEX omp_get_thread_num()
#define THREAD_COUNT omp_get_num_threads()
#else
#define THREAD_INDEX 0
#define THREAD_COUNT 1
#endif

#define STREAMED_FROM 4096 /* bytes of one copy; shorter ones are left to memcpy */
#define PAGE 4096
#define PAGES 4 /* copied line by line in turn: more requests under way, a third less time */

const int64_t multilora_scatter_piece_bytes = sizeof(struct scatter_piece);

static void copy(char *restrict to, const char *restrict from, size_t bytes) {
#if defined(__SSE2__)
    if (bytes >= STREAMED_FROM) {
        size_t head = (size_t)(-(uintptr_t)to & (LINE - 1));
        memcpy(to, from, head);
        to += head, from += head, bytes -= head;
        for (; bytes >= PAGES * PAGE; to += PAGES * PAGE, from += PAGES * PAGE, bytes -= PAGES * PAGE)
            for (size_t at = 0; at < PAGE; at += LINE)
                for (size_t i = at; i < PAGES * PAGE; i += PAGE) stream_line(to + i, from + i);
        for (; bytes >= LINE; to += LINE, from += LINE, bytes -= LINE) stream_line(to, from);
    }
#endif
    memcpy(to, from, bytes);
}

/* Bytes [first, last) of a piece; whole rows where they are apart in the slot. */
static void copy_part(const struct scatter_piece *p, int64_t first, int64_t last) {
    const char *from = (const char *)p->from;
    if (p->stride == p->row_bytes) {
        copy((char *)p->to + first, from + first, (size_t)(last - first));
        return;
    }
    int64_t end = (last + p->row_bytes - 1) / p->row_bytes;
    for (int64_t row = (first + p->row_bytes - 1) / p->row_bytes; row < end; row++)
        copy((char *)p->to + row * p->stride, from + row * p->row_bytes, (size_t)p->row_bytes);
}

void multilora_scatter(const struct scatter_piece *pieces, int64_t count, int64_t threads) {
    int64_t total = 0;
    for (int64_t i = 0; i < count; i++) total += pieces[i].rows * pieces[i].row_bytes;
#pragma omp parallel num_threads((int)threads)
    {
        int64_t first = total / THREAD_COUNT * THREAD_INDEX / LINE * LINE, begin = 0;
        int64_t last = total / THREAD_COUNT * (THREAD_INDEX + 1) / LINE * LINE;
        if (THREAD_INDEX + 1 == THREAD_COUNT) last = total;
        for (int64_t i = 0; i < count && begin < last; i++) {
            int64_t bytes = pieces[i].rows * pieces[i].row_bytes;
            int64_t from = first > begin ? first - begin : 0;
            int64_t to = last - begin < bytes ? last - begin : bytes;
            if (from < to) copy_part(&pieces[i], from, to);
            begin += bytes;
        }
        stream_end();
    }
}
