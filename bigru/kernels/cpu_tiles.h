// Vectors, and products of rows with packed panels in tiles that stay in registers.
//
// A tile is R rows times S * W vectors, held in registers over the whole sum. A panel is what it reads in order:
// [k][W][VW], of one vector of columns (W = 1), or of the three gates of one vector of units side by side (W = 3).
//
// The size of vectors follows from the compiler's flags, the type of numbers from -DDOUBLE.

#include <stddef.h>
#include <stdint.h>

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
#define LINE 64

#define INLINE static inline __attribute__((always_inline))

#ifdef DOUBLE
typedef double real;
typedef uint64_t integer;
#define VW (VECTOR_BYTES / 8) /* numbers in a vector */
#else
typedef float real;
typedef uint32_t integer;
#define VW (VECTOR_BYTES / 4)
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

// Products of rows as they lie in memory: out[r][j] = sum over k of a[r][k] b[k][j], or added to it unless `first`.
#define MOST_K 192 /* of a product: so that `PANEL_ROOM` numbers stay in the L1 cache */
#define PANELS 3
#define PANEL_STRIDE (MOST_K * VW + LINE / (intptr_t)sizeof(real))
#define PANEL_ROOM (PANELS * PANEL_STRIDE)

struct sums { real *const *out; intptr_t column, width; int first; const real *const *b; intptr_t n, K; };
static void add_sums(void *context, intptr_t u, int S, intptr_t row, int R, const vector *sums) {
  const struct sums *c = context;
  // The next panels' numbers come from afar: fetched during the products, they are there when they are needed.
  intptr_t next = c->column + PANELS * VW;
  if (next < c->width)
    for (intptr_t k = c->K * row / c->n; k < c->K * (row + R) / c->n; k++)
      for (int i = 0; i < PANELS * VECTOR_BYTES; i += LINE) __builtin_prefetch((const char *)(c->b[k] + next) + i);
  for (intptr_t r = row; r < row + R; r++)
    for (intptr_t v = u; v < u + S; v++, sums++) {
      real *out = c->out[r] + c->column + v * VW;
      int n = units_at(c->width - c->column, v);
      store_some(out, c->first ? *sums : load_some(out, n) + *sums, n);
    }
}
static void multiply_rows(const real *const *a, intptr_t n, const real *const *b, intptr_t K, intptr_t width,
                          real *const *out, int first, real *room) {
  for (intptr_t column = 0; column < width; column += PANELS * VW) {
    intptr_t count = (width - column + VW - 1) / VW;
    if (count > PANELS) count = PANELS;
    for (intptr_t s = 0; s < count; s++) {
      int some = units_at(width - column, s);
      for (intptr_t k = 0; k < K; k++) store(room + s * PANEL_STRIDE + k * VW, load_some(b[k] + column + s * VW, some));
    }
    struct sums context = {out, column, width, first, b, n, K};
    multiply(a, n, (struct panels){room, count, PANEL_STRIDE, K}, 1, add_sums, &context);
  }
}

// K rows of n numbers as n rows, MOST_K apart, of K numbers; `totals` gets the sums over K added.
static void transpose_rows(const real *rows, intptr_t stride, intptr_t K, intptr_t n, real *out, real *totals) {
  for (intptr_t k = 0; k < K; k += VW)
    for (intptr_t j = 0; j < n; j += VW) {
      vector v[VW], total = {0};
      for (int i = 0; i < VW; i++) {
        v[i] = k + i < K ? load_some(rows + (k + i) * stride + j, units_at(n, j / VW)) : (vector){0};
        total += v[i];
      }
      store(totals + j, load(totals + j) + total);
      transpose(v);
      for (int i = 0; i < VW; i++) store(out + (j + i) * MOST_K + k, v[i]);
    }
}
