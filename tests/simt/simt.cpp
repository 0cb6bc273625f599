// The machine behind simt.h. It is compiled without the thread sanitizer in every build: its bookkeeping and its
// hand-overs then order nothing, and only what the annotations say counts as synchronisation between CUDA threads. It
// still sees memset, memmove and free in here: no CUDA thread may free or move what another one has made.
#include "fiber.h"

#include <cstdio>
#include <cstdlib>
#include <list>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

namespace simt {

Thread* current = nullptr;
BlockView* block = nullptr;

struct Lanes {
  uint64_t values[kWarp];
};

namespace {

#if defined(SIMT_RACES)
constexpr unsigned kFibers = 192;  // at once: clang's runtime has 256 slots
#endif

struct Device {
  int sms = 4, shared_bytes = 64 << 10;
  bool cooperative = true;
} device;
constexpr int kBlocksOfSM = 2, kThreadsOfSM = 2048;
constexpr size_t kLittleShared = 48 << 10;  // more dynamic shared memory has to be asked for
std::set<const void*> much_shared;          // the kernels for which resident_blocks() did

std::string dropped_file;  // without its folder
int dropped_line = 0;

// Its two addresses alternate: with one, a thread that is already at the next barrier would be ordered before one that
// has not left this one.
struct Barrier {
  unsigned arrived = 0, generation = 0;
  int line = 0;  // where the first to arrive is
  char order[2];
};

struct Exchange {
  unsigned mask = 0;
  const char* what = nullptr;
  Barrier barrier;
  Lanes lanes[2];  // of even and odd generations: a fast lane may be one exchange ahead
};

struct Worker;
struct Grid;

struct Block : BlockView {
  Worker* worker = nullptr;
  Grid* all = nullptr;
  std::vector<Fiber> threads;
  std::vector<unsigned> turns;             // the next thread to run after each
  std::vector<std::list<Exchange>> warps;  // of each warp, one for every mask in use
  Barrier barrier;
  unsigned alive = 0, at_grid = 0;
  uint64_t idle = 0;  // switches since somebody got on
  Fiber scheduler;
  char start = 0, end = 0;  // addresses for the sanitizer
};

Block& here() { return *static_cast<Block*>(block); }

enum State { kReady, kAtGridSync, kFinished };

// An OS thread with its blocks, one after the other; its static thread_local variables are their __shared__ ones.
struct Worker {
  State state = kReady;
  Baton baton;
  std::deque<unsigned> blocks;
  Block current;
  unsigned number = 0;
};

struct Grid {
  const Launch& launch;
  std::deque<Worker> workers;
  std::vector<unsigned> turns;  // of the workers
  unsigned turn = 0;
  Barrier barrier;
  Baton finished;

  Worker* next();
};

// Which worker goes on; none if all have finished.
Worker* Grid::next() {
  for (size_t n = workers.size(); n; n--) {
    turn = (turn + 1) % workers.size();
    if (workers[turns[turn]].state == kReady) return &workers[turns[turn]];
  }
  for (const Worker& w : workers)
    if (w.state == kAtGridSync) fail("a grid sync that some block does not reach");
  return nullptr;
}

void hand_over(Grid& grid, Worker& from) {
  Worker* to = grid.next();
  if (to == &from) return;
  Thread* const thread = current;
  BlockView* const its_block = block;
  const bool back = from.state != kFinished;  // read before somebody else runs
  (to ? to->baton : grid.finished).pass();
  if (!back) return;
  from.baton.wait();
  current = thread;
  block = its_block;
}

Fiber* next_thread() {
  Block& b = here();
  unsigned i = me().rank;
  for (size_t n = b.threads.size(); n; n--) {
    i = b.turns[i];
    if (!b.threads[i].done) return &b.threads[i];
  }
  return &b.scheduler;
}

void yield() {
  Block& b = here();
  if (++b.idle > 4 * b.threads.size() + 64)
    fail(b.at_grid ? "a grid sync that some thread of the block does not reach"
                   : "a barrier or shuffle that some thread does not reach");
  Fiber* next = next_thread();
  if (next != &me()) switch_to(next);
}

void open(Barrier& b) {
  b.arrived = 0;
  b.generation++;
  here().idle = 0;
}

void wait(Barrier& b, unsigned expected, bool ordered, int line) {
  const unsigned generation = b.generation;
  if (b.arrived == 0) b.line = line;
  if (b.line != line) fail("threads are at different barriers");
  char* at = &b.order[generation & 1];
  if (ordered) release(at);
  if (++b.arrived == expected) open(b);
  while (b.generation == generation) yield();
  if (ordered) acquire(at);
}

// The barriers reached since simt_drop().
struct Known {
  Place place;
  const char* kind;
  bool dropped;
} known[1024];
size_t known_count = 0;

const char* name_of(const char* file) {
  const char* slash = std::strrchr(file, '/');
  return slash ? slash + 1 : file;
}

// Notes that the barrier was reached; true if it is the one to leave out.
bool is_dropped(Place place, const char* kind) {
  for (size_t i = 0; i < known_count; i++)
    if (known[i].place.line == place.line && known[i].place.file == place.file) return known[i].dropped;
  if (known_count == std::size(known)) fail("more barriers than simt.cpp has places for");
  const bool dropped = place.line == dropped_line && !std::strcmp(name_of(place.file), dropped_file.c_str());
  known[known_count++] = {place, kind, dropped};
  return dropped;
}

void thread_main() {
  arrived(nullptr);
  Block& b = here();
  acquire(&b.start);
  b.all->launch.body(b.all->launch.arguments);
  release(&b.end);
  me().done = true;
  b.alive--;
  b.idle = 0;
  if (b.alive && b.barrier.arrived == b.alive) open(b.barrier);  // exited threads do not count
  switch_to(next_thread());
  std::abort();
}

void run_block(Grid& grid, Worker& worker, unsigned number) {
  const Launch& launch = grid.launch;
  const unsigned n = launch.size.x * launch.size.y * launch.size.z;
  const dim3 g = launch.grid, size = launch.size;
  Block& b = worker.current;
  // Exact, so that the address sanitizer sees an overrun; NaN, so that what was never written shows.
  const std::unique_ptr<unsigned char[]> shared(new unsigned char[launch.shared]);
  std::memset(shared.get(), 0xff, launch.shared);
  fill_static_shared();
  b = Block{};
  b.index = {number % g.x, number / g.x % g.y, number / (g.x * g.y)};
  b.size = size;
  b.grid = g;
  b.shared = shared.get();
  b.worker = &worker;
  b.all = &grid;
  b.threads.resize(n);
  b.turns.resize(n);
  b.warps.resize((n + kWarp - 1) / kWarp);
  b.alive = n;
  std::vector<unsigned> turns(n);
  permute(turns, number);
  for (unsigned i = 0; i < n; i++) {
    Fiber& f = b.threads[i];
    f.rank = i;
    f.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    b.turns[turns[i]] = turns[(i + 1) % n];
    prepare(f, worker.number, thread_main);
    f.home = &b.scheduler;
  }
  b.scheduler.races = races_here();
  block = &b;
  current = &b.scheduler;
  release(&b.start);
  switch_to(&b.threads[turns[0]]);
  acquire(&b.end);
}

void work(Grid& grid, Worker& worker) {
  while (!worker.blocks.empty()) {
    const unsigned number = worker.blocks.front();
    worker.blocks.pop_front();
    run_block(grid, worker, number);
    if (worker.blocks.empty()) worker.state = kFinished;
    hand_over(grid, worker);
  }
}

// On the whole device.
int fitting_blocks(int threads, int shared_bytes) {
  if (threads > 1024 || shared_bytes > device.shared_bytes) return 0;
  const int by_shared = shared_bytes ? device.shared_bytes / shared_bytes : kBlocksOfSM;
  return std::min({kBlocksOfSM, kThreadsOfSM / threads, by_shared}) * device.sms;
}

void check(bool ok, const std::string& what) {
  if (!ok) throw std::runtime_error("simt: " + what);
}

}  // namespace

void fail(const char* what) {
  std::fprintf(stderr, "simt: %s (block %u,%u,%u, thread %u)\n", what, block->index.x, block->index.y, block->index.z,
               current->rank);
  std::abort();
}

void block_barrier(Place place) {
  if (!is_dropped(place, "__syncthreads")) wait(here().barrier, here().alive, true, place.line);
}

const Lanes* exchange(unsigned mask, uint64_t value, const char* what, bool ordered, Place place) {
  if (place.file && is_dropped(place, what)) return nullptr;
  Block& b = here();
  const unsigned lane = me().rank % kWarp, first = me().rank - lane;
  if (!(mask >> lane & 1)) fail("a lane that is not in the mask of its shuffle");
  for (unsigned i = 0; i < kWarp; i++)
    if (mask >> i & 1 && (first + i >= b.threads.size() || b.threads[first + i].done))
      fail("a shuffle names a lane that the block does not have, or that has returned");
  std::list<Exchange>& warp = b.warps[me().rank / kWarp];
  Exchange* e = nullptr;
  for (Exchange& known : warp)
    if (known.mask == mask) e = &known;
  if (!e) {
    e = &warp.emplace_back();
    e->mask = mask;
  }
  if (e->barrier.arrived == 0) e->what = what;
  if (e->what != what) fail("lanes of one warp are in different shuffles");
  const unsigned parity = e->barrier.generation & 1;
  e->lanes[parity].values[lane] = value;
  wait(e->barrier, __builtin_popcount(mask), ordered, place.line);
  return &e->lanes[parity];
}

uint64_t value_of(const Lanes* lanes, unsigned lane) { return lanes->values[lane]; }

void grid_barrier(Place place) {
  Block& b = here();
  Grid& grid = *b.all;
  if (!grid.launch.cooperative) fail("a grid sync in a launch that is not cooperative");
  if (is_dropped(place, "grid_sync")) return wait(b.barrier, b.alive, true, place.line);
  const unsigned generation = grid.barrier.generation;
  char* at = &grid.barrier.order[generation & 1];
  release(at);
  if (++b.at_grid == b.threads.size()) {  // a thread that has returned counts: a GPU hangs, and we say so
    b.at_grid = 0;
    b.worker->state = kAtGridSync;
    if (++grid.barrier.arrived == grid.workers.size()) {
      open(grid.barrier);
      for (Worker& w : grid.workers) w.state = kReady;
      permute(grid.turns, 7 + grid.barrier.generation);
      grid.turn = grid.workers.size() - 1;
    }
    hand_over(grid, *b.worker);
    b.idle = 0;
  } else {
    while (grid.barrier.generation == generation) yield();
  }
  acquire(at);
}

int resident_blocks(const void* kernel, int threads, int shared_bytes) {
  much_shared.insert(kernel);
  return fitting_blocks(threads, shared_bytes);
}

void run(const Launch& launch) {
  const dim3 g = launch.grid;
  const size_t threads = size_t{launch.size.x} * launch.size.y * launch.size.z, blocks = size_t{g.x} * g.y * g.z;
  check(threads >= 1 && threads <= 1024, "a block must have 1 to 1024 threads, not " + std::to_string(threads));
  check(blocks >= 1 && g.x < 1u << 31 && g.y < 1u << 16 && g.z < 1u << 16,
        "a grid must have at least one block and at most 2^31-1, 65535, 65535 along its axes");
  check(launch.shared <= static_cast<size_t>(device.shared_bytes),
        std::to_string(launch.shared) + " bytes of shared memory of " + std::to_string(device.shared_bytes));
  check(launch.shared <= kLittleShared || much_shared.count(launch.kernel),
        "more than 48 KiB of shared memory for a kernel that resident_blocks() was not asked about");
  if (launch.cooperative) {
    check(device.cooperative, "a cooperative launch on a device that has none");
    const size_t fit = fitting_blocks(static_cast<int>(threads), static_cast<int>(launch.shared));
    check(blocks <= fit, "a cooperative launch of " + std::to_string(blocks) + " blocks where " + std::to_string(fit) +
                             " are resident together");
  }
  size_t workers = launch.cooperative ? blocks : 1;
#if defined(SIMT_RACES)  // each worker's blocks follow each other, so that only blocks of different workers can race
  if (!launch.cooperative) workers = std::min(blocks, std::max<size_t>(2, kFibers / threads));
#endif
  Grid grid{launch, {}, {}, 0, {}, {}};
  std::vector<unsigned> turns(blocks);
  permute(turns, 7);
  for (size_t i = 0; i < workers; i++) {
    Worker& w = grid.workers.emplace_back();
    w.number = i;
    for (size_t k = i; k < blocks; k += workers) w.blocks.push_back(turns[k]);
    grid.turns.push_back(i);
  }
  if (workers == 1) return work(grid, grid.workers[0]);
  std::vector<std::thread> running;
  for (Worker& w : grid.workers) {
    running.emplace_back([&grid, &w] {
      w.baton.wait();
      work(grid, w);
    });
  }
  grid.workers[0].baton.pass();
  grid.finished.wait();
  for (std::thread& t : running) t.join();
}

}  // namespace simt

namespace wx::gpu {
int sm_count() { return simt::device.sms; }
int max_shared_bytes() { return simt::device.shared_bytes; }
bool cooperative_launch() { return simt::device.cooperative; }
}  // namespace wx::gpu

#define SIMT_EXPORT extern "C" __attribute__((used, visibility("default")))

SIMT_EXPORT void simt_order(int order) { simt::order = static_cast<simt::Order>(order); }

SIMT_EXPORT void simt_device(int sms, int shared_bytes, int cooperative) {
  simt::device = {sms, shared_bytes, cooperative != 0};
}

SIMT_EXPORT const char* simt_barriers() {
  using namespace simt;
  std::set<std::string> lines;  // a place in a header has a name in every source
  for (const Known *k = known, *end = known + known_count; k < end; k++)
    lines.insert(name_of(k->place.file) + (":" + std::to_string(k->place.line)) + " " + k->kind);
  static std::string text;
  text.clear();
  for (const std::string& line : lines) text += line + "\n";
  return text.c_str();
}

SIMT_EXPORT void simt_drop(const char* place) {
  const std::string text = place ? place : ":0";
  const size_t colon = text.rfind(':');
  simt::dropped_file = text.substr(0, colon);
  simt::dropped_line = std::atoi(text.c_str() + colon + 1);
  simt::known_count = 0;
}
