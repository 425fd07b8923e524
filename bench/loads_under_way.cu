// Which value does a load give that is under way when its stage is freed for a copy by TMA? (docs/machine_code.md)
//
//     nvcc -O3 -arch=sm_90a -o loads_under_way bench/loads_under_way.cu && ./loads_under_way [rounds] > rows.jsonl
//
// A ring of two stages of 128 bytes: one thread refills a stage by a bulk copy once 256 threads have arrived at its
// barrier, and each of those reads 16 bytes of it and arrives. Round r's copy brings r in all words. Beside them 128
// threads of the block store: nothing, to the GPU's own memory, or to a peer's, so many stores of 16 bytes in a row and
// a pause. Of two GPUs both run it at once, each storing to the other. A row counts the words that were not the round's.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "check.cuh"

enum Arrival { AT_ONCE, USED_FIRST, FENCED };
const char* const kArrivals[] = {"at once", "values used first", "behind fence.proxy.async"};
enum Sink { NOWHERE, OWN, PEER };
const char* const kSinks[] = {"none", "own memory", "peer's memory"};

constexpr int kStages = 2, kWords = 32, kRounds = 4096, kReaders = 256, kStorers = 128, kThreads = 512;
constexpr int kFirstStorer = kThreads - kStorers, kBlocksPerSm = 2, kMaxGpus = 2;
constexpr long kSinkVectors = (64l << 20) / sizeof(int4);

__device__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ void wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(barrier), "r"(parity));
}

// As TileLang's: no clobber of memory, so that the compiler is as free as there.
__device__ void arrive(uint32_t barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier)); }

template <Arrival kArrival>
__device__ unsigned read_stages(const int (*tile)[kWords], uint64_t* full, uint64_t* empty, int rounds) {
  unsigned wrong = 0;
  for (int round = 0; round < rounds; ++round) {
    const int stage = round % kStages, wanted = round % kRounds;
    wait(shared_address(&full[stage]), round / kStages & 1);
    const uint32_t from = shared_address(&tile[stage][threadIdx.x % 4 * 2]);
    int v[4];
    asm volatile("ld.shared.v2.s32 {%0, %1}, [%2];" : "=r"(v[0]), "=r"(v[1]) : "r"(from));
    asm volatile("ld.shared.v2.s32 {%0, %1}, [%2 + 32];" : "=r"(v[2]), "=r"(v[3]) : "r"(from));
    uint32_t barrier = shared_address(&empty[stage]);
    // No value is negative, which the compiler does not know: the address hangs on all of them.
    if (kArrival == USED_FIRST) barrier += static_cast<uint32_t>(v[0] | v[1] | v[2] | v[3]) >> 31;
    if (kArrival == FENCED) asm volatile("fence.proxy.async.shared::cta;");
    arrive(barrier);
    for (int value : v) wrong += value != wanted;
  }
  return wrong;
}

template <Arrival kArrival>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    ring(const int* source, int rounds, bool stores, int4* sink, int burst, int pause_ns, unsigned long long* wrong) {
  __shared__ __align__(128) int tile[kStages][kWords];
  __shared__ __align__(8) uint64_t full[kStages], empty[kStages];
  __shared__ volatile int is_over;
  const int thread = threadIdx.x;
  if (thread == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&full[stage])));
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&empty[stage])), "r"(kReaders));
    }
    is_over = 0;
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();
  if (thread < kReaders) {
    const unsigned found = read_stages<kArrival>(tile, full, empty, rounds);
    if (found > 0) atomicAdd(wrong, static_cast<unsigned long long>(found));
    asm volatile("bar.sync 1, %0;" ::"n"(kReaders));
    if (thread == 0) is_over = 1;
  } else if (thread == kReaders) {
    for (int round = 0; round < rounds; ++round) {
      const int stage = round % kStages;
      const uint32_t barrier = shared_address(&full[stage]);
      if (round >= kStages) wait(shared_address(&empty[stage]), (round / kStages + 1) & 1);
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "n"(sizeof(int) * kWords));
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                       shared_address(&tile[stage][0])),
                   "l"(source + round % kRounds * kWords), "n"(sizeof(int) * kWords), "r"(barrier)
                   : "memory");
    }
  } else if (thread >= kFirstStorer && stores) {
    const long step = static_cast<long>(gridDim.x) * kStorers;
    long at = static_cast<long>(blockIdx.x) * kStorers + thread - kFirstStorer;
    while (!is_over) {
      for (int i = 0; i < burst; ++i, at = at + step < kSinkVectors ? at + step : at % step)
        asm volatile("st.global.v4.s32 [%0], {%1, %1, %1, %1};" ::"l"(sink + at), "r"(thread) : "memory");
      if (pause_ns > 0) __nanosleep(pause_ns);
    }
  }
}

struct Gpu {
  int* source;
  int4* sink;
  unsigned long long* wrong;
  cudaEvent_t begin, end;
  int blocks;
};

template <Arrival kArrival>
void run(Gpu* gpus, int count, int rounds, Sink to, int burst, int pause_ns) {
  for (int d = 0; d < count; ++d) {
    CHECK(cudaSetDevice(d));
    CHECK(cudaMemset(gpus[d].wrong, 0, sizeof(unsigned long long)));
    CHECK(cudaEventRecord(gpus[d].begin));
    int4* sink = gpus[to == PEER ? count - 1 - d : d].sink;
    ring<kArrival><<<gpus[d].blocks, kThreads>>>(gpus[d].source, rounds, to != NOWHERE, sink, burst, pause_ns,
                                                 gpus[d].wrong);
    CHECK(cudaGetLastError());
    CHECK(cudaEventRecord(gpus[d].end));
  }
  for (int d = 0; d < count; ++d) {
    unsigned long long wrong;
    float ms;
    CHECK(cudaSetDevice(d));
    CHECK(cudaMemcpy(&wrong, gpus[d].wrong, sizeof wrong, cudaMemcpyDeviceToHost));
    CHECK(cudaEventElapsedTime(&ms, gpus[d].begin, gpus[d].end));
    cudaDeviceProp properties;
    CHECK(cudaGetDeviceProperties(&properties, d));
    std::printf(
        "{\"gpu\": \"%s\", \"number\": %d, \"arrival\": \"%s\", \"stores\": \"%s\", \"burst\": %d, \"pause_ns\": %d, "
        "\"rounds\": %d, \"words\": %.0f, \"wrong\": %llu, \"ns_a_round\": %.1f}\n",
        properties.name, d, kArrivals[kArrival], kSinks[to], burst, pause_ns, rounds,
        4.0 * kReaders * rounds * gpus[d].blocks, wrong, ms * 1e6 / rounds);
    std::fflush(stdout);
  }
}

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 60000;
  int count;
  CHECK(cudaGetDeviceCount(&count));
  count = count < kMaxGpus ? count : kMaxGpus;
  int* host = static_cast<int*>(std::malloc(sizeof(int) * kRounds * kWords));
  for (int i = 0; i < kRounds * kWords; ++i) host[i] = i / kWords;
  Gpu gpus[kMaxGpus];
  for (int d = 0; d < count; ++d) {
    CHECK(cudaSetDevice(d));
    CHECK(cudaMalloc(&gpus[d].source, sizeof(int) * kRounds * kWords));
    CHECK(cudaMemcpy(gpus[d].source, host, sizeof(int) * kRounds * kWords, cudaMemcpyHostToDevice));
    CHECK(cudaMalloc(&gpus[d].sink, sizeof(int4) * kSinkVectors));
    CHECK(cudaMalloc(&gpus[d].wrong, sizeof(unsigned long long)));
    CHECK(cudaEventCreate(&gpus[d].begin));
    CHECK(cudaEventCreate(&gpus[d].end));
    CHECK(cudaDeviceGetAttribute(&gpus[d].blocks, cudaDevAttrMultiProcessorCount, d));
    gpus[d].blocks *= kBlocksPerSm;
    if (count > 1) CHECK(cudaDeviceEnablePeerAccess(1 - d, 0));
  }
  for (int to = NOWHERE; to <= (count > 1 ? PEER : OWN); ++to)
    for (int burst : {4, 64})
      for (int pause_ns : {0, 1500}) {
        if (to == NOWHERE && (burst != 4 || pause_ns != 0)) continue;
        run<AT_ONCE>(gpus, count, rounds, Sink(to), burst, pause_ns);
        run<USED_FIRST>(gpus, count, rounds, Sink(to), burst, pause_ns);
        run<FENCED>(gpus, count, rounds, Sink(to), burst, pause_ns);
      }
}
