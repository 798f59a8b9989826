// Kernels with a fault each, for compute-sanitizer to find. Without it they end, and break nothing.
#pragma once

namespace check {

// Threads read what others write to shared memory, with no barrier between: racecheck.
void plant_race();
// One warp is at a barrier that the other never reaches, for it is at another: synccheck.
void plant_sync();

}  // namespace check
