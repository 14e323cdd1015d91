/* Which of the threads of an OpenMP region runs, and how many there are. */
#ifndef MULTILORA_THREADS_H
#define MULTILORA_THREADS_H

#if defined(_OPENMP)
int omp_get_thread_num(void);
int omp_get_num_threads(void);
#define THREAD_INDEX omp_get_thread_num()
#define THREAD_COUNT omp_get_num_threads()
#else
#define THREAD_INDEX 0
#define THREAD_COUNT 1
#endif

#endif
