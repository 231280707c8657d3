// The machine that ptx.py puts a kernel into, in place of the words REGISTERS and CODE below. It has a GPU's threads,
// barriers and memory, and rules that hardware leaves unsaid or unchecked. An access outside the launch's tensors, one
// that is not aligned to its width, a barrier that not all threads reach, or two accesses to one place (one of them a
// store) that no barrier and no acquired release puts in order end the launch with a message. A warp's shuffles and
// matrix instructions put nothing in order, as on a GPU.

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;

enum { WARP = 32, GRANULE = 2, COUNTERS = 4 };
enum { EXIT, AT_BARRIER, AT_WARP };  // why a thread stopped

enum { PLAIN, ADD, MAX, EXCHANGE };
typedef struct {  // by thread `thread` of program `program` - 1, after so many barriers and releases of that program
    s32 program, barriers;
    s16 thread, releases, atomic;
} Access;
// Of a granule of memory: the last store to it, of atomic ones also another program's last; who has loaded it since, as
// many as it takes to find one that a later store is in no order with: the last thread, another of its warp, one of
// another warp, and two of the program before.
enum { LAST, LANE, WARP_BEFORE, PROGRAM_BEFORE, OF_THAT_TOO, LOADERS };
typedef struct {
    Access stored[2], loaded[LOADERS];
} Shadow;
typedef struct {
    u64 first, end;
    Shadow *shadow;
} Span;
typedef struct {  // a place where programs release and acquire; how far each of them was when it came, thread -1 before
    u64 address;
    Access *released;
} Counter;

typedef struct {
    char *message;
    s64 message_size;
    jmp_buf stop;
    s64 programs;
    s32 threads;
    const unsigned char *params;
    Span *spans;
    s64 span_count;
    unsigned char *shared;
    u64 shared_size;
    Shadow *shared_shadow;
    Counter counters[COUNTERS];
    u32 (*exchange)[2][WARP][4];  // of each warp: what its threads bring to a collective operation; two, used in turn
    s64 *moved;  // bytes loaded and stored, those of global memory, which a program is counted for once
    // where it is
    s32 program, thread, barriers, releases, *collectives;
    Access acquired[COUNTERS];  // by which thread of this program, and after how many barriers; program 0 before
} Launch;

#define FAIL(...) (snprintf(m->message, m->message_size, __VA_ARGS__), longjmp(m->stop, 1))

static inline float f32_of(u32 x) { float y; memcpy(&y, &x, 4); return y; }
static inline u32 of_f32(float x) { u32 y; memcpy(&y, &x, 4); return y; }
static inline double f64_of(u64 x) { double y; memcpy(&y, &x, 8); return y; }
static inline u64 of_f64(double x) { u64 y; memcpy(&y, &x, 8); return y; }
// By hand, as not every compiler has the type.
static inline float f16_of(u16 x) {
    const int exponent = x >> 10 & 31, digits = x & 1023;
    const float y = ldexpf(digits + (exponent ? 1024 : 0), (exponent ? exponent : 1) - 25);
    return copysignf(exponent < 31 ? y : digits ? NAN : INFINITY, x >> 15 ? -1 : 1);
}
static inline u16 of_f16(float x) {
    const u32 bits = of_f32(x) & 0x7fffffff, sign = of_f32(x) >> 16 & 0x8000;
    if (x != x) return 0x7fff;
    if (fabsf(x) >= 65520) return sign | 0x7c00;
    if (fabsf(x) < 0x1p-14f) return sign | (u32)nearbyintf(fabsf(x) * 0x1p24f);
    return sign | ((bits + 0xfff + (bits >> 13 & 1)) >> 13) - (112 << 10);
}
static inline float bf16_of(u16 x) { return f32_of((u32)x << 16); }
static inline u16 of_bf16(float x) {
    u32 bits = of_f32(x);
    return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
static inline float ftz(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x; }

// Of NaN and a number the number, or NaN; of zeros the negative one is the smaller.
#define EXTREMES(T, F, S)                                                                                             \
    static inline T min_##F(T a, T b) {                                                                               \
        return a != a ? b : b != b ? a : a == b ? (signbit(a) ? a : b) : a < b ? a : b;                               \
    }                                                                                                                 \
    static inline T max_##F(T a, T b) {                                                                               \
        return a != a ? b : b != b ? a : a == b ? (signbit(a) ? b : a) : a > b ? a : b;                               \
    }                                                                                                                 \
    static inline T min_nan_##F(T a, T b) { return a != a || b != b ? (T)NAN : min_##F(a, b); }                       \
    static inline T max_nan_##F(T a, T b) { return a != a || b != b ? (T)NAN : max_##F(a, b); }
EXTREMES(float, f32, f)
EXTREMES(double, f64, )

// An approximate instruction is off by as much as its documentation allows, up or down by its operand.
static inline float approximately(float x, u32 seed) {
    float off = seed * 2654435761u >> 31 ? 0x1p-22f : -0x1p-22f;
    return x == 0 || x == 1 || isinf(x) || x != x ? x : x * (1 + off);  // it has 1 for zero
}
// rcp.approx.ftz.f64 takes and gives the upper half of a double's bits, good to 2^-20 or so.
static inline double coarse_reciprocal(double x) {
    double y = 1 / f64_of(of_f64(x) & ~0ull << 32);
    y = f64_of(of_f64(y) & ~0ull << 32);
    return fabs(x) < 0x1p-1022 ? copysign(INFINITY, x) : fabs(y) < 0x1p-1022 ? copysign(0, y) : y;
}
static inline s32 s32_of_float(double x, s32 of_nan) {
    return x != x ? of_nan : x <= -0x1p31 ? INT32_MIN : x >= 0x1p31 ? INT32_MAX : (s32)x;
}
static inline u32 permute_bytes(u32 a, u32 b, u32 selector) {
    u64 both = (u64)b << 32 | a;
    u32 out = 0;
    for (int i = 0; i < 4; i++) {
        u32 choice = selector >> 4 * i & 15, byte = both >> 8 * (choice & 7) & 255;
        out |= (choice & 8 ? (byte & 128 ? 255u : 0) : byte) << 8 * i;
    }
    return out;
}

// Whether an earlier access is over, for all to see, before what the current thread does now.
static int in_order(const Launch *m, const Access *before) {
    if (before->program == m->program + 1)
        return before->thread == m->thread || before->barriers < m->barriers;
    for (int i = 0; i < COUNTERS && m->counters[i].address; i++) {
        const Access *acquired = &m->acquired[i], *released = &m->counters[i].released[before->program - 1];
        if (acquired->program && (acquired->thread == m->thread || acquired->barriers < m->barriers)
            && (before->thread == released->thread ? before->releases < released->releases
                                                   : before->barriers < released->barriers))
            return 1;
    }
    return 0;
}

#define RACE(what, other, verb)                                                                                       \
    FAIL("line %d: program %d, thread %d %s what program %d, thread %d %s, in no order", line, m->program, m->thread,  \
         what, (other)->program - 1, (other)->thread, verb)

// Take note of an access to a granule. Threads of a program that hold copies of a number may all store it, and the
// order of additions, as of maxima, is nothing to their result.
static void touch(Launch *m, Shadow *shadow, const void *place, const void *from, int atomic, int line) {
    const Access now = {m->program + 1, m->barriers, m->thread, m->releases, atomic};
    Access *stored = shadow->stored, *loaded = shadow->loaded;
    const int commutes = (atomic == ADD || atomic == MAX) && stored[0].atomic == atomic;
    const int copy = from && !atomic && !stored[0].atomic && stored[0].program == now.program
                     && !memcmp(place, from, GRANULE);
    for (int i = 0; i < 2 && !commutes && !copy; i++)
        if (stored[i].program && !in_order(m, &stored[i])) RACE(from ? "stores over" : "loads", &stored[i], "stores");
    if (from) {
        for (int i = 0; i < LOADERS; i++)
            if (loaded[i].program && !in_order(m, &loaded[i])) RACE("stores over", &loaded[i], "loads");
        if (!commutes)
            stored[1].program = 0;
        else if (stored[0].program != now.program)
            stored[1] = stored[0];
        stored[0] = now;
        memset(loaded, 0, sizeof shadow->loaded);
        return;
    }
    if (loaded[LAST].program != now.program) {
        loaded[PROGRAM_BEFORE] = loaded[LAST];
        const int lane_is_older = loaded[LANE].barriers < loaded[WARP_BEFORE].barriers;
        loaded[OF_THAT_TOO] = loaded[lane_is_older || !loaded[LANE].program ? WARP_BEFORE : LANE];
        loaded[LANE] = loaded[WARP_BEFORE] = (Access){0};
    } else if (loaded[LAST].thread / WARP != now.thread / WARP) {
        loaded[WARP_BEFORE] = loaded[LAST];
        loaded[LANE] = (Access){0};
    } else if (loaded[LAST].thread != now.thread)
        loaded[LANE] = loaded[LAST];
    loaded[LAST] = now;
}

// Where an access to global memory goes: a load, or the store of what `from` points to.
static void *global(Launch *m, u64 address, u64 size, const void *from, int atomic, int line) {
    s64 low = 0, high = m->span_count;
    while (high - low > 1) {
        const s64 middle = (low + high) / 2;
        *(m->spans[middle].first <= address ? &low : &high) = middle;
    }
    const Span *span = &m->spans[low];
    const char *verb = from ? "stores" : "loads";
    if (address % size)
        FAIL("line %d: program %d, thread %d %s %d bytes at %#llx, which is no multiple of that", line, m->program,
             m->thread, verb, (int)size, (unsigned long long)address);
    if (!m->span_count || address < span->first || address + size > span->end)
        FAIL("line %d: program %d, thread %d %s %d bytes at %#llx, outside the launch's tensors", line, m->program,
             m->thread, verb, (int)size, (unsigned long long)address);
    for (u64 i = 0; i < size; i += GRANULE) {
        Shadow *shadow = &span->shadow[(address + i - span->first) / GRANULE];
        const Access *before = from ? shadow->stored : shadow->loaded;
        if (before->program != m->program + 1) m->moved[from != 0] += GRANULE;
        touch(m, shadow, (char *)address + i, from ? (char *)from + i : 0, atomic, line);
    }
    return (void *)address;
}

static void *shared(Launch *m, u32 address, u64 size, const void *from, int line) {
    if (address % size || address + size > m->shared_size)
        FAIL("line %d: program %d, thread %d %s %d bytes at %u of %d of shared memory", line, m->program, m->thread,
             from ? "stores" : "loads", (int)size, address, (int)m->shared_size);
    for (u64 i = 0; i < size && !from; i += GRANULE)
        if (!m->shared_shadow[(address + i) / GRANULE].stored[0].program)
            FAIL("line %d: program %d, thread %d loads %u of shared memory, where nothing is", line, m->program,
                 m->thread, (u32)(address + i));
    for (u64 i = 0; i < size; i += GRANULE)
        touch(m, &m->shared_shadow[(address + i) / GRANULE], m->shared + address + i, from ? (char *)from + i : 0, 0,
              line);
    return m->shared + address;
}

// A place that the programs come to with acquire and release: what they did before is seen by those that come later.
static void release_and_acquire(Launch *m, u64 address, int line) {
    int i = 0;
    while (i < COUNTERS && m->counters[i].address && m->counters[i].address != address) i++;
    if (i == COUNTERS) FAIL("line %d: more than %d counters", line, COUNTERS);
    Counter *counter = &m->counters[i];
    if (!counter->address) {
        counter->address = address;
        counter->released = malloc(m->programs * sizeof *counter->released);
        for (s64 p = 0; p < m->programs; p++) counter->released[p] = (Access){0, -1, -1};
    }
    m->releases++;
    m->acquired[i] = counter->released[m->program] = (Access){m->program + 1, m->barriers, m->thread, m->releases};
}

typedef struct {
    s32 at, why;  // where it goes on, and why it stopped there
    // REGISTERS
} Thread;

// A thread, up to where it stops next.
static int run(Launch *m, Thread *t, const s32 tid) {
    switch (t->at) {
    case 0:;
        // CODE
    }
    return EXIT;
}

// 0, or 1 with a message. Programs come in the order given; of the threads of one, warp by warp.
int launch(char *message, s64 message_size, s64 programs, const s32 *order, s32 threads, const unsigned char *params,
           u64 shared_size, const u64 *spans, s64 span_count, s32 backwards, s64 *moved) {
    Launch launch = {.message = message, .message_size = message_size, .programs = programs, .threads = threads,
                     .params = params, .shared_size = shared_size, .span_count = span_count, .moved = moved};
    Launch *m = &launch;
    Thread *state = malloc(threads * sizeof *state);
    m->shared = malloc(shared_size + 16);
    m->shared_shadow = malloc((shared_size / GRANULE + 1) * sizeof(Shadow));
    m->spans = malloc(span_count * sizeof(Span));
    m->collectives = malloc(threads * sizeof *m->collectives);
    m->exchange = malloc(threads / WARP * sizeof *m->exchange);
    for (s64 i = 0; i < span_count; i++)
        m->spans[i] = (Span){spans[2 * i], spans[2 * i + 1],
                             calloc((spans[2 * i + 1] - spans[2 * i]) / GRANULE + 1, sizeof(Shadow))};
    int status = setjmp(m->stop);
    for (s64 i = 0; !status && i < programs; i++) {
        m->program = order[i];
        m->barriers = m->releases = 0;
        memset(m->acquired, 0, sizeof m->acquired);
        memset(m->collectives, 0, threads * sizeof *m->collectives);
        memset(m->shared, 0xa5, shared_size);
        memset(m->shared_shadow, 0, (shared_size / GRANULE + 1) * sizeof(Shadow));
        memset(state, 0xa5, threads * sizeof *state);
        for (s32 t = 0; t < threads; t++) state[t].at = state[t].why = 0;
        for (int running = 1; running; m->barriers++) {
            for (s32 w = 0; w < threads / WARP; w++) {
                const s32 first = (backwards ? threads / WARP - 1 - w : w) * WARP;
                do {
                    for (s32 l = 0; l < WARP; l++) {
                        const s32 t = first + (backwards ? WARP - 1 - l : l);
                        m->thread = t;
                        state[t].why = run(m, &state[t], t);
                    }
                    for (s32 t = first; t < first + WARP; t++)
                        if (state[t].why != state[first].why || (state[t].why && state[t].at != state[first].at))
                            FAIL("program %d: threads %d and %d of a warp stop at different places", m->program, first,
                                 t);
                } while (state[first].why == AT_WARP);
            }
            running = state[0].why != EXIT;
            for (s32 t = 0; t < threads; t++)
                if (state[t].why != state[0].why || (running && state[t].at != state[0].at))
                    FAIL("program %d: threads 0 and %d stop at different barriers", m->program, t);
        }
    }
    for (s64 i = 0; i < span_count; i++) free(m->spans[i].shadow);
    for (int i = 0; i < COUNTERS; i++) free(m->counters[i].released);
    free(state), free(m->shared), free(m->shared_shadow), free(m->spans), free(m->exchange), free(m->collectives);
    return status;
}
