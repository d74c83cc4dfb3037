// One bidirectional GRU layer on a CPU: the recurrence with its input product, and the recurrence's gradient.
//
// The equations are those of bigru/kernels/reference.py: gates in the order r, z, n; q = W_hn h + b_hn.
// Work is cut into programs of (block of sequences, direction). A program holds the whole time loop and shares nothing
// with the others, so threads meet once, at the end of the layer. Every output element is one sum over k in rising
// order, whatever tile computes it: results do not depend on the number of threads.
//
// Layouts (all dense unless a stride is named; D = 2 directions, P = rows of all steps, in the order of time):
//   x (P, I), with strides x_t, x_b           y, dq, before (P, D, H)  gates (P, D, 4, H): r, z, n, q
//   gi instead of x (P, D, 3H) if !w_ih       dgi (P, D, 3H)           dy (P, D, H), with strides dy_t, dy_b
//   h0, h_n, dh_n, dh0 (D, B, H)              w_ih (3H, I), w_hh (3H, H), b_ih and b_hh (3H), b_hn (H), for each d
//   table (B + T) int64: each sequence's length, longest first, then each step's first row; without it P = T * B
// Nothing is read or computed past a sequence's end. Null where there is none or none is wanted: table, biases, gates,
// before (the state before each step). b_hn, the last third of b_hh, is read only beside gi.
//
// A tile is R rows times S * W vectors, held in registers over the whole sum. W_hh is packed at the start of a call so
// that a tile reads it in order: panels of one vector of units (forward: their three gates side by side), [k][W][VW].
// A panel serves all rows of the block before the next one, so that it stays in the L1 cache.
//
// GCC or Clang. Compiled once for each instruction set and type of numbers, each a Python extension named MODULE: the
// size of vectors follows from the compiler's flags, the type from -DDOUBLE. Without a MODULE it is C alone.

#define _GNU_SOURCE /* the affinity of threads */
#ifdef MODULE
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#endif
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#define MAX_ROWS 8
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#define MAX_ROWS 4
#elif defined(__x86_64__)
#define VECTOR_BYTES 16
#define MAX_ROWS 3 /* 16 registers and no fused multiply-add: each product needs one */
#else
#define VECTOR_BYTES 16
#define MAX_ROWS 8 /* 32 registers, as in AArch64 */
#endif
#define MAX_VECTORS 24 /* of a tile */
#define BLOCK_ROWS 64  /* sequences of a program, at most */
#define CHUNK_ROWS 64  /* rows whose input product is made at once: as many steps as they hold, at least one */
#define LINE 64

#define INLINE static inline __attribute__((always_inline))

// Every field is one word, so that Python passes a list of integers.
struct forward {
  const void *x, *w_ih[2], *w_hh[2], *b_ih[2], *b_hh[2], *b_hn[2], *h0;
  const int64_t *table;
  void *y, *h_n, *gates;
  intptr_t T, B, I, H, x_t, x_b;
};
struct backward {
  const void *dy, *dh_n, *y, *gates, *h0, *w_hh[2];
  const int64_t *table;
  void *dgi, *dq, *dh0, *before;
  intptr_t T, B, H, dy_t, dy_b;
};

// Row numbers of step t: `first` for sequence 0, `active` for how many of the sequences b0 ... b0 + rows have one.
INLINE intptr_t first_row(const int64_t *table, intptr_t B, intptr_t t) {
  return table ? (intptr_t)table[B + t] : t * B;
}
INLINE intptr_t active_rows(const int64_t *table, intptr_t b0, intptr_t rows, intptr_t t) {
  if (!table) return rows;
  while (rows > 0 && table[b0 + rows - 1] <= t) rows--;
  return rows;
}

// The next piece of a scratch buffer; with a null base only `used` grows, which tells how large a buffer must be.
static void *piece(char *base, size_t *used, size_t bytes) {
  char *at = base ? base + *used : NULL;
  *used += (bytes + LINE - 1) / LINE * LINE;
  return at;
}

#ifdef DOUBLE
typedef double real;
typedef uint64_t integer;
#define VW (VECTOR_BYTES / 8) /* numbers in a vector */
#define MANTISSA 52
#define LOG2E 1.4426950408889634
#define ROUNDER 6755399441055744.0 /* 1.5 * 2^52: what is added to it is rounded to an integer */
#define HIGHEST 1024
// (2^f - 1) / f on [-1/2, 1/2], from the constant term on: minimax, relative error 3e-19.
#define POLYNOMIAL \
  {0.693147180559945309, 0.240226506959100712, 0.055504108664821627, 0.00961812910762847949, 0.00133335581464064707, \
   0.000154035303933707334, 0.0000152527338415567726, 1.32154868087055628e-6, 1.01780570877339411e-7, \
   7.05489730415549928e-9, 4.45581790833606449e-10, 2.57293241773623042e-11}
#else
typedef float real;
typedef uint32_t integer;
#define VW (VECTOR_BYTES / 4)
#define MANTISSA 23
#define LOG2E 1.44269504f
#define ROUNDER 12582912.0f
#define HIGHEST 128
#define POLYNOMIAL \
  {0.693147188026f, 0.240226507606f, 0.0555035711422f, 0.00961808255728f, 0.00133908633647f, 0.000154531629451f} // 1e-8
#endif

typedef real vector __attribute__((vector_size(VECTOR_BYTES)));
typedef real unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));
typedef integer bits __attribute__((vector_size(VECTOR_BYTES)));

INLINE vector splat(real x) { return x - (vector){0}; }
INLINE vector load(const real *p) { return *(const unaligned *)p; }
INLINE void store(real *p, vector v) { *(unaligned *)p = v; }
// How many of vector u's elements are units: fewer than VW in the last.
INLINE int units_at(intptr_t H, intptr_t u) { return H - u * VW < VW ? (int)(H - u * VW) : VW; }
// The first n elements.
INLINE vector load_some(const real *p, int n) {
  if (n == VW) return load(p);
  vector v = {0};
  for (int i = 0; i < n; i++) v[i] = p[i];
  return v;
}
INLINE void store_some(real *p, vector v, int n) {
  if (n == VW) store(p, v);
  else for (int i = 0; i < n; i++) p[i] = v[i];
}

// x where it lies between two bounds, else the bound; NaN stays NaN. Each loop, if not unrolled, is one instruction.
INLINE vector clamp(vector x, real low, real high) {
  _Pragma("GCC unroll 1") for (int i = 0; i < VW; i++) x[i] = low > x[i] ? low : x[i];
  _Pragma("GCC unroll 1") for (int i = 0; i < VW; i++) x[i] = high < x[i] ? high : x[i];
  return x;
}

// 2^x as s * (1 + p), s a power of two, or infinity from x = HIGHEST on; p accurate however small x is.
INLINE vector power(vector x, vector *p) {
  static const real c[] = POLYNOMIAL;
  vector shifted = x + ROUNDER, f = x - (shifted - ROUNDER), q = splat(c[sizeof c / sizeof *c - 1]);
  _Pragma("GCC unroll 16") for (int i = sizeof c / sizeof *c - 2; i >= 0; i--) q = q * f + c[i];
  *p = q * f;
  // The lowest bits of `shifted` hold the integer; ROUNDER's own are shifted out.
  return (vector)(((bits)shifted << MANTISSA) + ((bits){0} + ((integer)(HIGHEST - 1) << MANTISSA)));
}
INLINE vector sigmoid(vector x) {
  vector p, s = power(clamp(x * (real)-LOG2E, 2 - HIGHEST, HIGHEST), &p);
  return 1 / (1 + s * (1 + p));
}
INLINE vector hyperbolic(vector x) {
  vector p, s = power(clamp(x * (real)(2 * LOG2E), -2 * MANTISSA, 2 * MANTISSA), &p);
  vector e = s * p + (s - 1); // exp(2 x) - 1
  return e / (e + 2);
}

// out[r][s * W + j] = sum over k of a[r][k] * w[s * stride + (k * W + j) * VW ...]
INLINE void sum_tile(const int R, const int S, const int W, intptr_t K, const real *const *a, const real *w,
                       intptr_t stride, vector *out) {
  vector c[MAX_VECTORS];
  const real *row[MAX_ROWS];
  _Pragma("GCC unroll 8") for (int r = 0; r < R; r++) row[r] = a[r];
  _Pragma("GCC unroll 24") for (int i = 0; i < R * S * W; i++) c[i] = (vector){0};
  for (intptr_t k = 0; k < K; k++, w += W * VW) {
    vector b[12];
    _Pragma("GCC unroll 8") for (int s = 0; s < S; s++)
      _Pragma("GCC unroll 8") for (int j = 0; j < W; j++) b[s * W + j] = load(w + s * stride + j * VW);
    _Pragma("GCC unroll 8") for (int r = 0; r < R; r++) {
      vector x = splat(row[r][k]);
      _Pragma("GCC unroll 12") for (int i = 0; i < S * W; i++) c[r * S * W + i] += x * b[i];
    }
  }
  _Pragma("GCC unroll 24") for (int i = 0; i < R * S * W; i++) out[i] = c[i];
}

// Tiles that are compiled: W = 3 for the gates of a unit, W = 1 for single vectors. Twelve sums or more hide a fused
// multiply-add's latency; few rows take more panels at once.
#define TILES_3(X) X(1, 1, 3) X(1, 2, 3) X(1, 4, 3) X(2, 1, 3) X(2, 2, 3) X(3, 1, 3) \
  X(1, 1, 1) X(1, 2, 1) X(1, 4, 1) X(1, 8, 1) X(2, 1, 1) X(2, 2, 1) X(2, 3, 1) X(2, 4, 1) \
  X(3, 1, 1) X(3, 2, 1) X(3, 3, 1)
#define TILES_4(X) X(4, 1, 3) X(4, 1, 1) X(4, 2, 1) X(4, 3, 1)
#define TILES_8(X) X(5, 1, 3) X(5, 1, 1) X(5, 2, 1) X(5, 3, 1) X(6, 1, 3) X(6, 1, 1) X(6, 2, 1) X(6, 3, 1) \
  X(7, 1, 3) X(7, 1, 1) X(7, 2, 1) X(7, 3, 1) X(8, 1, 3) X(8, 1, 1) X(8, 2, 1) X(8, 3, 1)
#if MAX_ROWS == 8
#define TILES(X) TILES_3(X) TILES_4(X) TILES_8(X)
#elif MAX_ROWS == 4
#define TILES(X) TILES_3(X) TILES_4(X)
#else
#define TILES(X) TILES_3(X)
#endif

#define COMPILE(R, S, W) \
  static __attribute__((noinline)) void tile_##R##_##S##_##W( \
    intptr_t K, const real *const *a, const real *w, intptr_t stride, vector *out) { \
    sum_tile(R, S, W, K, a, w, stride, out); }
TILES(COMPILE)
#undef COMPILE

// A product of n rows of length K with packed panels. `done` gets each tile's sums, as `sum_tile` leaves them.
struct panels { const real *w; intptr_t count, stride, K; };
typedef void done(void *context, intptr_t panel, int S, intptr_t row, int R, const vector *sums);

INLINE void multiply(const real *const *a, intptr_t n, struct panels p, int W, done *done, void *context) {
  vector sums[MAX_VECTORS];
  if (n == 0) return;
  intptr_t tiles = (n + MAX_ROWS - 1) / MAX_ROWS;
  for (intptr_t u = 0, left; (left = p.count - u) > 0;) {
    // Rows are shared out evenly among tiles, and panels among groups, so that no tile is left with too few sums.
    intptr_t R = (n + tiles - 1) / tiles, S = 1;
    if (R == 1) S = left >= 8 && W == 1 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
    else if (R == 2) S = left >= 4 && W == 1 ? 4 : left >= 2 ? 2 : 1;
    else if (W == 1) S = (left + (left + 2) / 3 - 1) / ((left + 2) / 3);
    for (intptr_t i = 0, row = 0; i < tiles; i++, row += R) {
      R = n * (i + 1) / tiles - n * i / tiles;
      const real *w = p.w + u * p.stride;
      switch (R * 100 + S * 10 + W) {
#define CALL(R, S, W) case R * 100 + S * 10 + W: tile_##R##_##S##_##W(p.K, a + row, w, p.stride, sums); break;
        TILES(CALL)
#undef CALL
      }
      done(context, u, S, row, R, sums);
    }
    u += S;
  }
}

// Elements of a and b by number: those of b follow those of a.
INLINE vector pick(vector a, vector b, bits numbers) {
#ifdef __clang__
  vector v;
  _Pragma("unroll") for (int i = 0; i < VW; i++) v[i] = numbers[i] < VW ? a[numbers[i]] : b[numbers[i] - VW];
  return v;
#else
  return __builtin_shuffle(a, b, numbers);
#endif
}

#define EACH_2(f) f(0), f(1)
#define EACH_4(f) EACH_2(f), f(2), f(3)
#define EACH_8(f) EACH_4(f), f(4), f(5), f(6), f(7)
#define EACH_16(f) EACH_8(f), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)
#if VW == 2
#define EACH(f) {EACH_2(f)}
#elif VW == 4
#define EACH(f) {EACH_4(f)}
#elif VW == 8
#define EACH(f) {EACH_8(f)}
#else
#define EACH(f) {EACH_16(f)}
#endif

// VW rows of VW numbers transposed: first within lanes of 16 bytes, where pairs of rows are zipped in blocks of `step`,
// then by exchanging lanes.
INLINE void transpose(vector *v) {
  enum { LANE = 16 / sizeof(real) };
  _Pragma("GCC unroll 4") for (int step = 1; step < VW; step *= 2) {
    // Element i of a row's zipped lower (upper) half in each lane, or of its lanes exchanged.
#define ZIPPED(i) (i / LANE * LANE + i % LANE / step / 2 * step + i % step + (i % LANE / step & 1) * VW)
#define LOW(i) step < LANE ? ZIPPED(i) : i & step ? VW + i - step : i
#define HIGH(i) step < LANE ? ZIPPED(i) + LANE / 2 : i & step ? VW + i : i + step
    bits low = EACH(LOW), high = EACH(HIGH);
    vector old[VW];
    _Pragma("GCC unroll 16") for (int i = 0; i < VW; i++) old[i] = v[i];
    _Pragma("GCC unroll 16") for (int i = 0; i < VW; i++)
      if (!(i & step)) {
        // Zipped rows 0 and 2 of four are rows 0 and 1 of the result, 1 and 3 are 2 and 3.
        int four = step == 2 && step < LANE, to = four ? i / 4 * 4 + i % 4 * 2 : i, next = four ? to + 1 : i + step;
        v[to] = pick(old[i], old[i + step], low), v[next] = pick(old[i], old[i + step], high);
      }
  }
}

// Panels of W_ih or W_hh (3H, K) for products with rows of length K: [unit vector][k][gate][VW], units past H zero.
static void pack_gates(const real *w, intptr_t H, struct panels p, real *out) {
  for (intptr_t u = 0; u < p.count; u++)
    for (intptr_t g = 0; g < 3; g++) {
      const real *rows = w + (g * H + u * VW) * p.K;
      real *o = out + u * p.stride + g * VW;
      int some = units_at(H, u);
      for (intptr_t k = 0; k < p.K; k += VW) {
        vector v[VW];
        int n = p.K - k < VW ? p.K - k : VW;
        for (int i = 0; i < VW; i++) v[i] = i < some ? load_some(rows + i * p.K + k, n) : (vector){0};
        transpose(v);
        for (int i = 0; i < n; i++) store(o + (k + i) * 3 * VW, v[i]);
      }
    }
}

// The scratch of a forward program; `base` may be null, to learn its size.
struct forward_scratch {
  real *w_ih, *w_hh, *bias, *b_hn, *gi;
  const real **inputs, **states;
  struct panels ih, hh;
  intptr_t units, chunk; // vectors of units; steps whose input product is made at once
};
static size_t lay_out_forward(struct forward_scratch *s, const struct forward *c, intptr_t rows, char *base) {
  size_t used = 0;
  s->units = (c->H + VW - 1) / VW;
  intptr_t capacity = rows < CHUNK_ROWS ? CHUNK_ROWS : rows; // no less for more rows: the last block may have fewer
  s->chunk = capacity / rows;
  // Panels a line further apart than their size: tiles that read several at once would else meet in one cache set.
  s->hh = (struct panels){NULL, s->units, c->H * 3 * VW + LINE / sizeof(real), c->H};
  s->ih = (struct panels){NULL, s->units, c->I * 3 * VW + LINE / sizeof(real), c->I};
  s->w_hh = piece(base, &used, s->units * s->hh.stride * sizeof(real));
  s->w_ih = c->w_ih[0] ? piece(base, &used, s->units * s->ih.stride * sizeof(real)) : NULL;
  s->bias = piece(base, &used, s->units * 3 * VW * sizeof(real));
  s->b_hn = piece(base, &used, s->units * VW * sizeof(real));
  s->gi = piece(base, &used, capacity * s->units * 3 * VW * sizeof(real));
  s->inputs = piece(base, &used, capacity * sizeof(real *));
  s->states = piece(base, &used, rows * sizeof(real *));
  s->hh.w = s->w_hh, s->ih.w = s->w_ih;
  return used;
}
static size_t forward_bytes(const struct forward *c, intptr_t rows) {
  struct forward_scratch s;
  return lay_out_forward(&s, c, rows, NULL);
}

// gi of a tile: sums and biases, [row][unit vector][gate][VW].
static void finish_gi(void *context, intptr_t u, int S, intptr_t row, int R, const vector *sums) {
  struct forward_scratch *s = context;
  for (int r = 0; r < R; r++)
    for (int v = 0; v < 3 * S; v++)
      store(s->gi + ((row + r) * s->units + u) * 3 * VW + v * VW, *sums++ + load(s->bias + u * 3 * VW + v * VW));
}

// The new states of a tile, from W_hh h.
struct step {
  const real *gi, *b_hn;
  const real *const *h;
  real *y, *gates; // of the step's first row
  intptr_t units, H;
};
static void finish_step(void *context, intptr_t u0, int S, intptr_t row, int R, const vector *sums) {
  const struct step *c = context;
  intptr_t H = c->H;
  vector r_z[MAX_VECTORS], *of = r_z;
  const vector *sum = sums;
  // r and z of the whole tile first: the processor looks far enough ahead to compute several of them at once, but not
  // several states from their sums on.
  for (intptr_t b = row; b < row + R; b++)
    for (intptr_t u = u0; u < u0 + S; u++, sum += 3, of += 2) {
      const real *gi = c->gi + (b * c->units + u) * 3 * VW;
      of[0] = sigmoid(sum[0] + load(gi)), of[1] = sigmoid(sum[1] + load(gi + VW));
    }
  of = r_z;
  for (intptr_t b = row; b < row + R; b++)
    for (intptr_t u = u0; u < u0 + S; u++, sums += 3, of += 2) {
      intptr_t j = u * VW;
      int n = units_at(H, u);
      vector r = of[0], z = of[1], h = load_some(c->h[b] + j, n), q = sums[2] + load(c->b_hn + j);
      vector new = hyperbolic(load(c->gi + ((b * c->units + u) * 3 + 2) * VW) + r * q);
      store_some(c->y + b * 2 * H + j, new + z * (h - new), n);
      if (c->gates) {
        real *gates = c->gates + b * 8 * H + j;
        store_some(gates, r, n);
        store_some(gates + H, z, n);
        store_some(gates + 2 * H, new, n);
        store_some(gates + 3 * H, q, n);
      }
    }
}

static void forward(const void *call, int d, intptr_t b0, intptr_t rows, char *scratch) {
  const struct forward *c = call;
  struct forward_scratch s;
  lay_out_forward(&s, c, rows, scratch);
  intptr_t H = c->H, T = c->T;
  const real *x = c->x, *b_ih = c->b_ih[d], *b_hh = c->b_hh[d], *b_hn = b_hh ? b_hh + 2 * H : c->b_hn[d];
  pack_gates(c->w_hh[d], H, s.hh, s.w_hh);
  if (s.w_ih) pack_gates(c->w_ih[d], H, s.ih, s.w_ih);
  for (intptr_t j = 0; j < s.units * VW; j++) {
    for (intptr_t g = 0; g < 3; g++)
      s.bias[j / VW * 3 * VW + g * VW + j % VW] = j < H && b_ih ? b_ih[g * H + j] + (g < 2 ? b_hh[g * H + j] : 0) : 0;
    s.b_hn[j] = j < H && b_hn ? b_hn[j] : 0;
  }
  for (intptr_t b = 0; b < rows; b++) s.states[b] = (const real *)c->h0 + (d * c->B + b0 + b) * H;
  for (intptr_t s0 = 0; s0 < T; s0 += s.chunk) {
    intptr_t end = s0 + s.chunk < T ? s0 + s.chunk : T, count = 0;
    for (intptr_t i = s0; i < end; i++) {
      intptr_t t = d ? T - 1 - i : i, first = first_row(c->table, c->B, t) + b0;
      for (intptr_t b = 0, active = active_rows(c->table, b0, rows, t); b < active; b++, count++)
        if (!s.w_ih) s.inputs[count] = x + (first + b) * 6 * H + d * 3 * H;
        else s.inputs[count] = x + (c->table ? (first + b) * c->x_b : t * c->x_t + (b0 + b) * c->x_b);
    }
    if (s.w_ih) multiply(s.inputs, count, s.ih, 3, finish_gi, &s);
    else
      for (intptr_t i = 0; i < count; i++)
        for (intptr_t u = 0; u < s.units; u++)
          for (intptr_t g = 0; g < 3; g++)
            store(s.gi + ((i * s.units + u) * 3 + g) * VW, load_some(s.inputs[i] + g * H + u * VW, units_at(H, u)));
    const real *gi = s.gi;
    for (intptr_t i = s0; i < end; i++) {
      intptr_t t = d ? T - 1 - i : i;
      intptr_t row = first_row(c->table, c->B, t) + b0, active = active_rows(c->table, b0, rows, t);
      real *y = (real *)c->y + (row * 2 + d) * H, *gates = c->gates ? (real *)c->gates + (row * 2 + d) * 4 * H : NULL;
      struct step step = {gi, s.b_hn, s.states, y, gates, s.units, H};
      multiply(s.states, active, s.hh, 3, finish_step, &step);
      for (intptr_t b = 0; b < active; b++) s.states[b] = y + b * 2 * H;
      gi += active * s.units * 3 * VW;
    }
  }
  for (intptr_t b = 0; b < rows; b++) memcpy((real *)c->h_n + (d * c->B + b0 + b) * H, s.states[b], H * sizeof(real));
}

struct backward_scratch {
  real *w, *dh; // dh: [row][unit vector][VW]
  const real **dgi, **dq;
  struct panels rz, n; // W_hh by unit vector, [k][VW], k over the rows of r and z, and of n
  intptr_t units;
  // Rows of the next step and the distance between them: gates, dy and y, and those to be written, dgi and dq.
  struct ahead { const real *first; intptr_t stride; } ahead[10];
  int from, to; // which of them to fetch
};
static size_t lay_out_backward(struct backward_scratch *s, const struct backward *c, intptr_t rows, char *base) {
  size_t used = 0;
  intptr_t stride = c->H * 3 * VW + LINE / sizeof(real);
  s->units = (c->H + VW - 1) / VW;
  s->w = piece(base, &used, s->units * stride * sizeof(real));
  s->dh = piece(base, &used, rows * s->units * VW * sizeof(real));
  s->dgi = piece(base, &used, rows * sizeof(real *));
  s->dq = piece(base, &used, rows * sizeof(real *));
  s->rz = (struct panels){s->w, s->units, stride, 2 * c->H};
  s->n = (struct panels){base ? s->w + 2 * c->H * VW : NULL, s->units, stride, c->H};
  return used;
}
static size_t backward_bytes(const struct backward *c, intptr_t rows) {
  struct backward_scratch s;
  return lay_out_backward(&s, c, rows, NULL);
}

static void add_dh(void *context, intptr_t u, int S, intptr_t row, int R, const vector *sums) {
  const struct backward_scratch *s = context;
  for (intptr_t b = row; b < row + R; b++)
    for (intptr_t v = u; v < u + S; v++) {
      real *dh = s->dh + (b * s->units + v) * VW;
      store(dh, load(dh) + *sums++);
      // The next step's rows come from memory: fetched during the products, they are there when they are needed.
      if (v % (LINE / VECTOR_BYTES) == 0 || v == u)
        for (int i = s->from; i < s->to; i++) __builtin_prefetch(s->ahead[i].first + b * s->ahead[i].stride + v * VW);
    }
}

static void backward(const void *call, int d, intptr_t b0, intptr_t rows, char *scratch) {
  const struct backward *c = call;
  struct backward_scratch s;
  lay_out_backward(&s, c, rows, scratch);
  intptr_t H = c->H, T = c->T, width = s.units * VW;
  intptr_t of_states = (d * c->B + b0) * H;
  const real *w = c->w_hh[d], *dh_n = (const real *)c->dh_n + of_states, *h0 = (const real *)c->h0 + of_states;
  real *dh0 = (real *)c->dh0 + of_states;
  for (intptr_t u = 0; u < s.units; u++)
    for (intptr_t k = 0; k < 3 * H; k++)
      store(s.w + u * s.rz.stride + k * VW, load_some(w + k * H + u * VW, units_at(H, u)));
  for (intptr_t b = 0; b < rows; b++)
    for (intptr_t j = 0; j < width; j++) s.dh[b * width + j] = j < H ? dh_n[b * H + j] : 0;
  for (intptr_t i = 0; i < T; i++) {
    intptr_t t = d ? i : T - 1 - i, before = d ? t + 1 : t - 1;
    intptr_t row = first_row(c->table, c->B, t) + b0, active = active_rows(c->table, b0, rows, t);
    intptr_t had = i < T - 1 ? active_rows(c->table, b0, rows, before) : 0; // sequences with a step before this one
    const real *y_before = had ? (const real *)c->y + ((first_row(c->table, c->B, before) + b0) * 2 + d) * H : NULL;
    for (intptr_t b = 0; b < active; b++) {
      intptr_t at = (row + b) * 2 + d; // of (P, D)
      const real *gates = (const real *)c->gates + at * 4 * H, *h_prev = b < had ? y_before + b * 2 * H : h0 + b * H;
      const real *dy = (const real *)c->dy + d * H;
      dy += c->table ? (row + b) * c->dy_b : t * c->dy_t + (b0 + b) * c->dy_b;
      real *dgi = (real *)c->dgi + at * 3 * H, *dq = (real *)c->dq + at * H, *dh = s.dh + b * width;
      for (intptr_t j = 0; j < H; j += VW) {
        int some = units_at(H, j / VW);
        vector g = load(dh + j) + load_some(dy + j, some), h = load_some(h_prev + j, some);
        vector r = load_some(gates + j, some), z = load_some(gates + H + j, some);
        vector n = load_some(gates + 2 * H + j, some), q = load_some(gates + 3 * H + j, some);
        vector da_n = g * (1 - z) * (1 - n * n), dq_j = da_n * r;
        store_some(dgi + j, da_n * q * r * (1 - r), some);
        store_some(dgi + H + j, g * (h - n) * z * (1 - z), some);
        store_some(dgi + 2 * H + j, da_n, some);
        store_some(dq + j, dq_j, some);
        store(dh + j, g * z);
      }
      if (c->before) memcpy((real *)c->before + at * H, h_prev, H * sizeof(real));
      s.dgi[b] = dgi, s.dq[b] = dq;
    }
    if (had) {
      intptr_t row_next = first_row(c->table, c->B, before) + b0, next = row_next * 2 + d;
      const real *gates = (const real *)c->gates + next * 4 * H, *dgi = (const real *)c->dgi + next * 3 * H;
      const real *dy = (const real *)c->dy + d * H + (c->table ? row_next * c->dy_b : before * c->dy_t + b0 * c->dy_b);
      for (int g = 0; g < 4; g++) s.ahead[g] = (struct ahead){gates + g * H, 8 * H};
      s.ahead[4] = (struct ahead){dy, c->dy_b};
      s.ahead[5] = (struct ahead){y_before + (row_next - row) * 2 * H, 2 * H}; // right where all steps have as many rows
      for (int g = 0; g < 3; g++) s.ahead[6 + g] = (struct ahead){dgi + g * H, 6 * H};
      s.ahead[9] = (struct ahead){(const real *)c->dq + next * H, 2 * H};
    }
    s.from = 0, s.to = had ? 6 : 0;
    multiply(s.dgi, active, s.rz, 1, add_dh, &s);
    s.from = 6, s.to = had ? 10 : 6;
    multiply(s.dq, active, s.n, 1, add_dh, &s);
  }
  for (intptr_t b = 0; b < rows; b++) memcpy(dh0 + b * H, s.dh + b * width, H * sizeof(real));
}

// A job: programs handed out one after another to the caller's thread and to threads made for this call. None outlives
// the call, so none spins, a fork leaves nothing behind, and calls from several Python threads need not know each other.
struct job {
  void (*program)(const void *call, int d, intptr_t b0, intptr_t rows, char *scratch);
  const void *call;
  intptr_t B, rows, programs;
  size_t scratch_bytes;
  char *scratch;
  atomic_intptr_t next, threads; // the next program; threads that have begun
};

static void *work(void *argument) {
  struct job *job = argument;
  char *scratch = job->scratch + atomic_fetch_add(&job->threads, 1) * job->scratch_bytes;
  for (intptr_t i; (i = atomic_fetch_add(&job->next, 1)) < job->programs;) {
    intptr_t b0 = i / 2 * job->rows, rows = job->B - b0 < job->rows ? job->B - b0 : job->rows;
    job->program(job->call, i % 2, b0, rows, scratch);
  }
  return NULL;
}

// Sequences of one program: blocks that fill the threads, but not so small that weights are read for few rows.
static intptr_t block_rows(intptr_t B, intptr_t threads) {
  intptr_t blocks = (B + BLOCK_ROWS - 1) / BLOCK_ROWS, most = (B + 3) / 4;
  if (blocks < (threads + 1) / 2) blocks = (threads + 1) / 2;
  if (blocks > most) blocks = most;
  intptr_t rows = (B + blocks - 1) / blocks;
  return rows < MAX_ROWS ? rows : (rows + MAX_ROWS - 1) / MAX_ROWS * MAX_ROWS;
}

static int run(struct job *job, intptr_t threads) {
  job->programs = 2 * ((job->B + job->rows - 1) / job->rows);
  pthread_t others[64];
  int started = 0;
  if (threads > job->programs) threads = job->programs;
  if (threads > 65) threads = 65;
  void *memory;
  if (posix_memalign(&memory, LINE, job->scratch_bytes * threads)) return -1;
  job->scratch = memory;
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
#ifdef __linux__
  // Away from this thread's processor, where a new thread may else wait for milliseconds until it is moved.
  cpu_set_t processors;
  if (!sched_getaffinity(0, sizeof processors, &processors)) {
    CPU_CLR(sched_getcpu(), &processors);
    if (CPU_COUNT(&processors)) pthread_attr_setaffinity_np(&attributes, sizeof processors, &processors);
  }
#endif
  // Where the system refuses a thread the others do its work.
  while (started < threads - 1 && !pthread_create(&others[started], &attributes, work, job)) started++;
  pthread_attr_destroy(&attributes);
  work(job);
  while (started) pthread_join(others[--started], NULL);
  free(memory);
  return 0;
}

#ifdef MODULE
// forward(threads, *fields of struct forward), and backward: no checks, the caller is bigru/kernels/cpu.py.
static PyObject *call(PyObject *const *args, Py_ssize_t count, void *fields, Py_ssize_t expected) {
  if (count != expected + 1)
    return PyErr_Format(PyExc_TypeError, "expected %zd integers, got %zd", expected + 1, count);
  for (Py_ssize_t i = 0; i < expected; i++) ((intptr_t *)fields)[i] = (intptr_t)PyLong_AsSsize_t(args[i + 1]);
  if (PyErr_Occurred()) return NULL;
  return Py_None;
}

static PyObject *finish(struct job *job, PyObject *const *args) {
  intptr_t threads = PyLong_AsSsize_t(args[0]);
  if (PyErr_Occurred()) return NULL;
  int failed;
  Py_BEGIN_ALLOW_THREADS
  failed = run(job, threads);
  Py_END_ALLOW_THREADS
  if (failed) return PyErr_NoMemory();
  Py_INCREF(Py_None);
  return Py_None;
}

static PyObject *py_forward(PyObject *self, PyObject *const *args, Py_ssize_t count) {
  struct forward c;
  if (!call(args, count, &c, sizeof c / sizeof(intptr_t))) return NULL;
  struct job job = {.program = forward, .call = &c, .B = c.B};
  job.rows = block_rows(c.B, PyLong_AsSsize_t(args[0]));
  job.scratch_bytes = forward_bytes(&c, job.rows);
  return finish(&job, args);
}

static PyObject *py_backward(PyObject *self, PyObject *const *args, Py_ssize_t count) {
  struct backward c;
  if (!call(args, count, &c, sizeof c / sizeof(intptr_t))) return NULL;
  struct job job = {.program = backward, .call = &c, .B = c.B};
  job.rows = block_rows(c.B, PyLong_AsSsize_t(args[0]));
  job.scratch_bytes = backward_bytes(&c, job.rows);
  return finish(&job, args);
}

static PyMethodDef methods[] = {
  {"forward", (PyCFunction)(void (*)(void))py_forward, METH_FASTCALL, "The layer, or the recurrence on given gi."},
  {"backward", (PyCFunction)(void (*)(void))py_backward, METH_FASTCALL, "The recurrence's gradient."},
  {NULL, NULL, 0, NULL},
};
#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, TEXT(MODULE), NULL, -1, methods, NULL, NULL, NULL, NULL};
PyMODINIT_FUNC JOIN(PyInit, MODULE)(void) { return PyModule_Create(&module); }
#endif
