// What do other instructions cost while the tensor core multiplies? (docs/issue_under_products.md)
//
//     nvcc -O3 -std=c++17 -arch=sm_90a -o issue bench/issue_under_products.cu && ./issue > rows.jsonl
//
// Some warpgroups of a block do nothing but products of 64 x n x 32 e4m3 with fp32 sums, four at a time; the others
// nothing but one kind of instruction. Each is timed alone, and while the other goes on all the time. Cycles are of
// the multiprocessor's clock: a product's are those between two products of a block, an instruction's those between
// two that one scheduler issues.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>

#include "check.cuh"

enum Op { FFMA, FFMA_OF_THREE, FADD, FADD_OF_CONSTANT, FMNMX, LOP3, IMAD, FMNMX_FFMA };
const char* const kOps[] = {"FFMA", "FFMA of three registers", "FADD", "FADD of a constant", "FMNMX", "LOP3", "IMAD", "FMNMX, FFMA"};

constexpr int kWarpgroup = 128, kMaxGroups = 4, kMultiprocessors = 132;
constexpr int kOperandBytes = 1 << 16, kSecondOperand = 1 << 14, kInTurn = 32, kOthers = 16;
constexpr int kProductRounds = 2000, kOpRounds = 4000, kProductsARound = 4, kLonger = 4;
constexpr uint32_t kOnes = 0x38383838;  // e4m3

// Operand numbers and registers of a product's sums, ten and eight at a time.
#define TEN(t) "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9"
#define SUMS8(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])
#define SUMS32(i) SUMS8(i), SUMS8(i + 8), SUMS8(i + 16), SUMS8(i + 24)
#define WGMMA(n) "wgmma.mma_async.sync.aligned.m64n" #n "k32.f32.e4m3.e4m3 "
#define TO_31 TEN() ", " TEN(1) ", " TEN(2) ", %30, %31"
#define TO_63 TEN() ", " TEN(1) ", " TEN(2) ", " TEN(3) ", " TEN(4) ", " TEN(5) ", %60, %61, %62, %63"
#define TO_127 TEN() ", " TEN(1) ", " TEN(2) ", " TEN(3) ", " TEN(4) ", " TEN(5) ", " TEN(6) ", " TEN(7) ", " TEN(8) ", " TEN(9) ", " TEN(10) ", " TEN(11) ", %120, %121, %122, %123, %124, %125, %126, %127"

// The first operand comes from registers, but for 256 columns, whose sums leave too few.
template <int kColumns>
__device__ __forceinline__ void multiply(float* c, const uint32_t* a, uint64_t first, uint64_t second) {
  const int adds = 1;  // to what the sums are
  if constexpr (kColumns == 64)
    asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0; " WGMMA(64) "{" TO_31 "}, {%32, %33, %34, %35}, %36, p, 1, 1;}" : SUMS32(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(second), "r"(adds));
  if constexpr (kColumns == 128)
    asm volatile("{.reg .pred p; setp.ne.b32 p, %69, 0; " WGMMA(128) "{" TO_63 "}, {%64, %65, %66, %67}, %68, p, 1, 1;}" : SUMS32(0), SUMS32(32) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(second), "r"(adds));
  if constexpr (kColumns == 256)
    asm volatile("{.reg .pred p; setp.ne.b32 p, %130, 0; " WGMMA(256) "{" TO_127 "}, %128, %129, p, 1, 1;}" : SUMS32(0), SUMS32(32), SUMS32(64), SUMS32(96) : "l"(first), "l"(second), "r"(adds));
}

template <Op kOp, int kChains>
__device__ __forceinline__ void issue(float* x, float y, float z) {
#pragma unroll
  for (int n = 0; n < kInTurn; ++n) {
    float& r = x[n % kChains];
    uint32_t& bits = reinterpret_cast<uint32_t&>(r);
    const uint32_t y_bits = __float_as_uint(y), z_bits = __float_as_uint(z);
    if constexpr (kOp == FFMA) asm volatile("fma.rn.f32 %0, %1, %2, %0;" : "+f"(r) : "f"(y), "f"(z));
    if constexpr (kOp == FFMA_OF_THREE) asm volatile("fma.rn.f32 %0, %1, %2, %0;" : "+f"(r) : "f"(x[kInTurn + n % 8]), "f"(x[kInTurn + 8 + n % 8]));
    if constexpr (kOp == FADD) asm volatile("add.f32 %0, %0, %1;" : "+f"(r) : "f"(y));
    if constexpr (kOp == FADD_OF_CONSTANT) asm volatile("add.f32 %0, %0, 0f3F900000;" : "+f"(r));
    if (kOp == FMNMX || (kOp == FMNMX_FFMA && n % 2 == 0)) asm volatile("max.f32 %0, %0, %1;" : "+f"(r) : "f"(y));
    if (kOp == FMNMX_FFMA && n % 2 == 1) asm volatile("fma.rn.f32 %0, %1, %2, %0;" : "+f"(r) : "f"(y), "f"(z));
    if constexpr (kOp == LOP3) asm volatile("lop3.b32 %0, %0, %1, %2, 0x96;" : "+r"(bits) : "r"(y_bits), "r"(z_bits));
    if constexpr (kOp == IMAD) asm volatile("mad.lo.u32 %0, %1, %2, %0;" : "+r"(bits) : "r"(y_bits), "r"(z_bits));
  }
}

// The first `product_groups` warpgroups make `products` rounds of products, the others `ops` rounds of instructions.
template <int kColumns, Op kOp, int kChains>
__global__ void __launch_bounds__(kColumns == 256 ? 3 * kWarpgroup : kMaxGroups* kWarpgroup, 1)
    run(int products, int ops, int product_groups, long long* cycles, float* sink) {
  extern __shared__ __align__(1024) uint8_t operands[];
  for (int i = threadIdx.x; i < kOperandBytes / 4; i += blockDim.x) reinterpret_cast<uint32_t*>(operands)[i] = kOnes + (i & 7);
  asm volatile("fence.proxy.async.shared::cta;");
  __syncthreads();
  const uint64_t swizzled_128 = 1ull << 62 | 64ull << 32 | 1ull << 16;  // rows of 128 bytes, eight rows after 1024
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(operands));
  const uint64_t first = swizzled_128 | (at & 0x3ffff) >> 4, second = swizzled_128 | ((at + kSecondOperand) & 0x3ffff) >> 4;
  const int group = threadIdx.x / kWarpgroup;
  float sum = 0;
  const long long start = clock64();
  if (group < product_groups) {
    float c[kColumns / 2];
    const uint32_t a[4] = {kOnes, 0x30303030, 0x38303830, 0x28282828};
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) c[i] = 0;
    for (int round = 0; round < products; ++round) {
      asm volatile("wgmma.fence.sync.aligned;");
#pragma unroll
      for (int k = 0; k < kProductsARound; ++k) multiply<kColumns>(c, a, first + 2 * k, second + 2 * k);
      asm volatile("wgmma.commit_group.sync.aligned;");
      asm volatile("wgmma.wait_group.sync.aligned 0;");
    }
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) sum += c[i];
  } else {
    float x[kInTurn + kOthers];
#pragma unroll
    for (int i = 0; i < kInTurn + kOthers; ++i) x[i] = threadIdx.x + i;
    const float y = threadIdx.x * 0.25f, z = threadIdx.x * 0.5f + 1;
    for (int round = 0; round < ops; ++round) issue<kOp, kChains>(x, y, z);
#pragma unroll
    for (float value : x) sum += value;
  }
  const long long stop = clock64();
  if (sum == 1.2345f) sink[threadIdx.x] = sum;  // all results are needed
  if (threadIdx.x % kWarpgroup == 0) cycles[blockIdx.x * kMaxGroups + group] = stop - start;
}

template <int kColumns, Op kOp, int kChains>
void measure(int product_groups, int op_groups) {
  long long* cycles;
  float* sink;
  CHECK(cudaMalloc(&cycles, kMultiprocessors * kMaxGroups * sizeof *cycles));
  CHECK(cudaMalloc(&sink, kMaxGroups * kWarpgroup * sizeof *sink));
  auto* kernel = run<kColumns, kOp, kChains>;
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kOperandBytes));
  long long of_block[kMaxGroups];
  const auto launch = [&](int products, int ops) {
    kernel<<<kMultiprocessors, kWarpgroup * (product_groups + op_groups), kOperandBytes>>>(
        products, ops, product_groups, cycles, sink);
    CHECK(cudaMemcpy(of_block, cycles, sizeof of_block, cudaMemcpyDeviceToHost));
  };
  const auto of_product = [&](int rounds) { return static_cast<double>(of_block[0]) / rounds / kProductsARound; };
  const auto of_op = [&](int rounds) { return static_cast<double>(of_block[product_groups]) / rounds / kInTurn; };
  for (int twice = 0; twice < 2; ++twice) launch(kProductRounds, 0);
  const double product = of_product(kProductRounds);
  for (int twice = 0; twice < 2; ++twice) launch(0, kOpRounds);
  const double op = of_op(kOpRounds);
  const int as_long = static_cast<int>(kProductRounds * kProductsARound * product / (kInTurn * op));
  launch(kProductRounds, kLonger * as_long);
  const double product_beside = of_product(kProductRounds);
  launch(kLonger * kProductRounds, as_long);
  const double op_beside = of_op(as_long);
  std::printf(
      "{\"experiment\": \"issue-under-products\", \"n\": %d, \"a\": \"%s\", \"op\": \"%s\", \"chains\": %d, "
      "\"product_groups\": %d, \"other_groups\": %d, \"product_cycles\": %.1f, \"op_cycles\": %.3f, "
      "\"product_cycles_beside\": %.1f, \"op_cycles_beside\": %.3f}\n",
      kColumns, kColumns == 256 ? "shared" : "registers", kOps[kOp], kChains, product_groups, op_groups,
      product / product_groups, op / op_groups, product_beside / product_groups, op_beside / op_groups);
  std::fflush(stdout);
  CHECK(cudaFree(cycles));
  CHECK(cudaFree(sink));
}

template <int kColumns>
void measure_all(int product_groups) {
  for (int op_groups = 1; op_groups <= 2; ++op_groups) {
    measure<kColumns, FFMA, kInTurn>(product_groups, op_groups);
    measure<kColumns, FFMA, 2>(product_groups, op_groups);
    measure<kColumns, FFMA, 1>(product_groups, op_groups);
    measure<kColumns, FFMA_OF_THREE, kInTurn>(product_groups, op_groups);
    measure<kColumns, FADD, kInTurn>(product_groups, op_groups);
    measure<kColumns, FADD_OF_CONSTANT, kInTurn>(product_groups, op_groups);
    measure<kColumns, FMNMX, kInTurn>(product_groups, op_groups);
    measure<kColumns, LOP3, kInTurn>(product_groups, op_groups);
    measure<kColumns, IMAD, kInTurn>(product_groups, op_groups);
    measure<kColumns, FMNMX_FFMA, kInTurn>(product_groups, op_groups);
  }
}

int main() {
  measure_all<64>(2);
  measure_all<128>(2);
  measure_all<256>(1);
}
