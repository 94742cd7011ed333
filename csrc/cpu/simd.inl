// SPDX-License-Identifier: MIT
// Vectors of GS_LANES doubles by the GCC/Clang vector extension, and loads and stores of the four dtypes.
namespace gs::GS_ISA {

#define GS_INLINE inline __attribute__((always_inline))

constexpr int64_t kLanes = GS_LANES;
constexpr int64_t kStep = 2 * kLanes;  // columns per iteration: two vectors of doubles, one of floats

template <class In>
constexpr int64_t kLine = std::min<int64_t>(kStep, 64 / sizeof(In));  // columns of a step in one cache line

typedef double vdouble __attribute__((vector_size(8 * GS_LANES)));
typedef int64_t vint64 __attribute__((vector_size(8 * GS_LANES)));
typedef float vfloat __attribute__((vector_size(8 * GS_LANES)));  // kStep floats
typedef float vhalf __attribute__((vector_size(4 * GS_LANES)));   // kLanes floats: converts to one vdouble
typedef double vquad __attribute__((vector_size(32)));            // four sums of a tile's row
typedef uint32_t vuint32 __attribute__((vector_size(4 * GS_LANES)));
typedef uint16_t vuint16 __attribute__((vector_size(2 * GS_LANES)));

template <class V>
GS_INLINE V load_as(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

template <class V>
GS_INLINE void store_as(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

// Convert kLanes floats to doubles and back. Intrinsics, because GCC splits these conversions of whole registers.
GS_INLINE vdouble widen(vhalf x) {
#if GS_LANES == 8
  return (vdouble)_mm512_cvtps_pd((__m256)x);
#elif GS_LANES == 4
  return (vdouble)_mm256_cvtps_pd((__m128)x);
#else
  return __builtin_convertvector(x, vdouble);
#endif
}
GS_INLINE vhalf narrow(vdouble x) {
#if GS_LANES == 8
  return (vhalf)_mm512_cvtpd_ps((__m512d)x);
#elif GS_LANES == 4
  return (vhalf)_mm256_cvtpd_ps((__m256d)x);
#else
  return __builtin_convertvector(x, vhalf);
#endif
}

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// kLanes elements as floats. Exact.
GS_INLINE vhalf load_floats(const float* p) { return load_as<vhalf>(p); }
GS_INLINE vhalf load_floats(const bfloat16* p) {
  return (vhalf)(__builtin_convertvector(load_as<vuint16>(p), vuint32) << 16);
}
GS_INLINE vhalf load_floats(const float16* p) {
#if GS_LANES == 8
  return (vhalf)_mm256_cvtph_ps(load_as<__m128i>(p));
#elif GS_LANES == 4
  return (vhalf)_mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)p));
#else
  // Exponent and mantissa move into place as a float that is 2^112 too small; Inf and NaN get the float exponent.
  const vuint32 half = __builtin_convertvector(load_as<vuint16>(p), vuint32);
  const vhalf magnitude = (vhalf)((half & 0x7fff) << 13) * 0x1p112f;
  const vuint32 special = (vuint32)(magnitude >= 65536.0f) & 0x7f800000u;
  return (vhalf)((vuint32)magnitude | special | ((half & 0x8000) << 16));
#endif
}

// kStep elements as floats. Exact.
GS_INLINE vfloat load_wide(const float* p) { return load_as<vfloat>(p); }
GS_INLINE vfloat load_wide(const bfloat16* p) {
#if GS_LANES == 8
  return (vfloat)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_as<__m256i>(p)), 16);
#elif GS_LANES == 4
  return (vfloat)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_as<__m128i>(p)), 16);
#else
  const vhalf halves[2] = {load_floats(p), load_floats(p + kLanes)};
  return load_as<vfloat>(halves);
#endif
}
GS_INLINE vfloat load_wide(const float16* p) {
#if GS_LANES == 8
  return (vfloat)_mm512_cvtph_ps(load_as<__m256i>(p));
#elif GS_LANES == 4
  return (vfloat)_mm256_cvtph_ps(load_as<__m128i>(p));
#else
  const vhalf halves[2] = {load_floats(p), load_floats(p + kLanes)};
  return load_as<vfloat>(halves);
#endif
}

GS_INLINE bool is_zero_value(float x) { return x == 0; }
GS_INLINE bool is_zero_value(bfloat16 x) { return (x.bits & 0x7fff) == 0; }
GS_INLINE bool is_zero_value(float16 x) { return (x.bits & 0x7fff) == 0; }

// kLanes elements as doubles. Exact.
GS_INLINE vdouble load_doubles(const double* p) { return load_as<vdouble>(p); }
template <class In>
GS_INLINE vdouble load_doubles(const In* p) {
  return widen(load_floats(p));
}

// Round to nearest even (16-bit formats by way of float).
GS_INLINE void store_doubles(double* p, vdouble v) { store_as(p, v); }
GS_INLINE void store_doubles(float* p, vdouble v) { store_as(p, narrow(v)); }
GS_INLINE void store_doubles(bfloat16* p, vdouble v) {
  const vhalf f = narrow(v);
  const vuint32 bits = (vuint32)f;
  const vuint32 nan = (vuint32)(f != f);
  const vuint32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  store_as(p, __builtin_convertvector((rounded & ~nan) | (0x7fc0 & nan), vuint16));
}
GS_INLINE void store_doubles(float16* p, vdouble v) {
  const vhalf f = narrow(v);
#if GS_LANES == 8
  store_as(p, _mm256_cvtps_ph((__m256)f, _MM_FROUND_TO_NEAREST_INT));
#elif GS_LANES == 4
  _mm_storel_epi64((__m128i*)p, _mm_cvtps_ph((__m128)f, _MM_FROUND_TO_NEAREST_INT));
#else
  const vuint32 bits = (vuint32)f & 0x7fffffff;
  const vuint32 sign = ((vuint32)f >> 16) & 0x8000;
  // Below 2^-14 the addition of 0.5 rounds the mantissa to the half's fixed spacing of 2^-24.
  const vuint32 subnormal = (vuint32)((vhalf)bits + 0.5f) - 0x3f000000u;
  const vuint32 normal = (bits - (112u << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
  const vuint32 is_small = (vuint32)(bits < (113u << 23));
  const vuint32 is_large = (vuint32)(bits >= 0x477ff000u);  // rounds to 65536 or more: infinity
  const vuint32 is_nan = (vuint32)(bits > 0x7f800000u);
  vuint32 half = (subnormal & is_small) | (normal & ~is_small);
  half = (0x7c00 & is_large) | (half & ~is_large);
  half = (0x7e00 & is_nan) | (half & ~is_nan);
  store_as(p, __builtin_convertvector(half | sign, vuint16));
#endif
}

// Copies past the cache if the destination's alignment allows it; stream_fence() must end a sequence of copies.
GS_INLINE void stream_copy(void* to, const void* from, int64_t bytes) {
#if GS_LANES == 8
  if (reinterpret_cast<uintptr_t>(to) % 64 == 0 && bytes % 64 == 0) {
    for (int64_t i = 0; i < bytes; i += 64) {
      _mm512_stream_si512((__m512i*)((char*)to + i), load_as<__m512i>((const char*)from + i));
    }
    return;
  }
#elif GS_LANES == 4
  if (reinterpret_cast<uintptr_t>(to) % 32 == 0 && bytes % 32 == 0) {
    for (int64_t i = 0; i < bytes; i += 32) {
      _mm256_stream_si256((__m256i*)((char*)to + i), load_as<__m256i>((const char*)from + i));
    }
    return;
  }
#endif
  std::memcpy(to, from, bytes);
}

GS_INLINE void stream_fence() {
#if GS_LANES >= 4
  _mm_sfence();
#endif
}

#if defined(__clang__)
#define GS_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t vint32 __attribute__((vector_size(8 * GS_LANES)));
template <class V>
using vmask = std::conditional_t<std::is_same<V, vdouble>::value, vint64, vint32>;
#define GS_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vmask<std::decay_t<decltype(a)>>{__VA_ARGS__})
#endif

// sums[0..3] = the sum of all lanes of a, of b, of c and of d.
GS_INLINE void lane_sums(vdouble a, vdouble b, vdouble c, vdouble d, double* sums) {
#if GS_LANES == 8
  const vdouble ab = GS_SHUFFLE(a, b, 0, 8, 2, 10, 4, 12, 6, 14) + GS_SHUFFLE(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
  const vdouble cd = GS_SHUFFLE(c, d, 0, 8, 2, 10, 4, 12, 6, 14) + GS_SHUFFLE(c, d, 1, 9, 3, 11, 5, 13, 7, 15);
  const vdouble s = GS_SHUFFLE(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) + GS_SHUFFLE(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
  for (int i = 0; i < 4; i++) sums[i] = s[i] + s[i + 4];
#elif GS_LANES == 4
  const vdouble ab = GS_SHUFFLE(a, b, 0, 4, 2, 6) + GS_SHUFFLE(a, b, 1, 5, 3, 7);
  const vdouble cd = GS_SHUFFLE(c, d, 0, 4, 2, 6) + GS_SHUFFLE(c, d, 1, 5, 3, 7);
  store_as(sums, GS_SHUFFLE(ab, cd, 0, 1, 4, 5) + GS_SHUFFLE(ab, cd, 2, 3, 6, 7));
#else
  sums[0] = a[0] + a[1];
  sums[1] = b[0] + b[1];
  sums[2] = c[0] + c[1];
  sums[3] = d[0] + d[1];
#endif
}

// Sums each group of four lanes (16 bytes) of a, b, c and d; each group of the result holds (a, b, c, d)'s sums.
GS_INLINE vfloat quad_sums(vfloat a, vfloat b, vfloat c, vfloat d) {
#if GS_LANES == 8
  const __m512 ab = _mm512_unpacklo_ps((__m512)a, (__m512)b) + _mm512_unpackhi_ps((__m512)a, (__m512)b);
  const __m512 cd = _mm512_unpacklo_ps((__m512)c, (__m512)d) + _mm512_unpackhi_ps((__m512)c, (__m512)d);
  return (vfloat)(__m512)_mm512_unpacklo_pd((__m512d)ab, (__m512d)cd) +
         (vfloat)(__m512)_mm512_unpackhi_pd((__m512d)ab, (__m512d)cd);
#elif GS_LANES == 4
  const __m256 ab = _mm256_unpacklo_ps((__m256)a, (__m256)b) + _mm256_unpackhi_ps((__m256)a, (__m256)b);
  const __m256 cd = _mm256_unpacklo_ps((__m256)c, (__m256)d) + _mm256_unpackhi_ps((__m256)c, (__m256)d);
  return (vfloat)(__m256)_mm256_unpacklo_pd((__m256d)ab, (__m256d)cd) +
         (vfloat)(__m256)_mm256_unpackhi_pd((__m256d)ab, (__m256d)cd);
#else
  const vfloat ab = GS_SHUFFLE(a, b, 0, 4, 1, 5) + GS_SHUFFLE(a, b, 2, 6, 3, 7);
  const vfloat cd = GS_SHUFFLE(c, d, 0, 4, 1, 5) + GS_SHUFFLE(c, d, 2, 6, 3, 7);
  return GS_SHUFFLE(ab, cd, 0, 1, 4, 5) + GS_SHUFFLE(ab, cd, 2, 3, 6, 7);
#endif
}

// Four running sums in float64, fed with quads.
class QuadSums {
 public:
  GS_INLINE void add(vfloat quads) {
    vhalf halves[2];
    __builtin_memcpy(halves, &quads, sizeof(halves));
#if GS_LANES >= 4
    sum_ += widen(halves[0]) + widen(halves[1]);
#else
    sum_ += widen(halves[0]);
    upper_ += widen(halves[1]);
#endif
  }
  GS_INLINE void store(double* sums) const {
#if GS_LANES == 8
    vquad halves[2];
    __builtin_memcpy(halves, &sum_, sizeof(halves));
    store_as(sums, halves[0] + halves[1]);
#else
    store_as(sums, sum_);
#if GS_LANES == 2
    store_as(sums + 2, upper_);
#endif
#endif
  }

 private:
  vdouble sum_ = {};
#if GS_LANES == 2
  vdouble upper_ = {};
#endif
};

}  // namespace gs::GS_ISA
