// Vectors of floats as wide as this CPU's registers, and the types that they are read from.

#ifndef PALLAS_KERNELS_CPU_VECTOR_H_
#define PALLAS_KERNELS_CPU_VECTOR_H_

#include <algorithm>
#include <cstdint>
#include <utility>

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
// Memory is read through these types wherever it starts.
typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));
typedef int8_t Bytes __attribute__((vector_size(kLanes), aligned(1), may_alias));
typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));

struct BFloat16 {
  uint16_t bits;
};
struct Float8 {
  uint8_t bits;
};

inline Vector Load(const float* x) { return *reinterpret_cast<const Vector*>(x); }

inline Vector Load(const BFloat16* x) {
  return (Vector)(__builtin_convertvector(*reinterpret_cast<const Halves*>(x), Ints) << 16);
}

inline Vector Load(const int8_t* x) { return __builtin_convertvector(*reinterpret_cast<const Bytes*>(x), Vector); }

// e4m3fn without its NaN, which a cache does not hold.
inline Vector Load(const Float8* x) {
  const Ints bits = __builtin_convertvector(*reinterpret_cast<const Bytes*>(x), Ints);
  const Ints magnitude = bits & 0x7f;
  const Vector normal = (Vector)((magnitude << 20) + (120 << 23));
  const Vector subnormal = __builtin_convertvector(magnitude, Vector) * 0x1p-9f;
  const Vector value = magnitude < 8 ? subnormal : normal;
  return (Vector)((Ints)value | (bits & INT32_MIN));
}

inline void Store(float* x, Vector value) { *reinterpret_cast<Vector*>(x) = value; }

inline Vector Max(Vector a, Vector b) { return a > b ? a : b; }

inline float Sum(Vector x) {
  const Four* parts = reinterpret_cast<const Four*>(&x);
  Four sum = parts[0];
  for (int i = 1; i < kLanes / 4; ++i) sum += parts[i];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

inline float Largest(Vector x) {
  const Four* parts = reinterpret_cast<const Four*>(&x);
  Four largest = parts[0];
  for (int i = 1; i < kLanes / 4; ++i) largest = largest > parts[i] ? largest : parts[i];
  return std::max(std::max(largest[0], largest[1]), std::max(largest[2], largest[3]));
}

// Every other run of `distance` lanes of a and then b, from lane `first` on, so that their runs take turns.
template <int distance, int first, size_t... lane>
inline Vector Runs(Vector a, Vector b, std::index_sequence<lane...>) {
  constexpr auto from = [](int i) {
    return first + i / (2 * distance) * (2 * distance) + i % distance + (i / distance % 2 ? kLanes : 0);
  };
#if defined(__clang__)
  return __builtin_shufflevector(a, b, from(lane)...);
#else
  return __builtin_shuffle(a, b, Ints{from(lane)...});
#endif
}

// Makes the rows of a square its columns: blocks of `distance` off the diagonal change places, then smaller ones.
template <int distance = kLanes / 2>
inline void Transpose(Vector* x) {
  constexpr std::make_index_sequence<kLanes> lanes{};
  for (int i = 0; i < kLanes; ++i) {
    if (i & distance) continue;
    const Vector a = x[i], b = x[i + distance];
    x[i] = Runs<distance, 0>(a, b, lanes);
    x[i + distance] = Runs<distance, distance>(a, b, lanes);
  }
  if constexpr (distance > 1) Transpose<distance / 2>(x);
}

// Lanes of a and b that lie `distance` apart, added: in runs of `distance`, now a's and now b's.
template <int distance>
inline Vector AddHalves(Vector a, Vector b) {
  constexpr std::make_index_sequence<kLanes> lanes{};
  return Runs<distance, 0>(a, b, lanes) + Runs<distance, distance>(a, b, lanes);
}

// The sum of the lanes of x[i] in lane i: as many shuffles for all as two sums alone would take.
template <int count = kLanes>
inline Vector SumEach(Vector* x) {
  if constexpr (count == 1) {
    return x[0];
  } else {
    for (int i = 0; i < count / 2; ++i) x[i] = AddHalves<count / 2>(x[i], x[i + count / 2]);
    return SumEach<count / 2>(x);
  }
}

// e^x within some units in the last place, x brought to where the result is a normal number.
inline Vector Exp(Vector x) {
  x = Max(x, Vector{} - 87.0f);
  x = x < 88.0f ? x : Vector{} + 88.0f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: what is added to it loses its fraction
  const Vector power = (x * 1.44269504f + kRound) - kRound;
  const Vector rest = (x - power * 0.693359375f) - power * -2.12194440e-4f;
  Vector series = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  for (const float next : {8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 0.5f, 1.0f, 1.0f}) {
    series = series * rest + next;
  }
  return series * (Vector)((__builtin_convertvector(power, Ints) + 127) << 23);
}

inline Vector Tanh(Vector x) { return 1.0f - 2.0f / (Exp(x * 2.0f) + 1.0f); }

}  // namespace

#endif  // PALLAS_KERNELS_CPU_VECTOR_H_
