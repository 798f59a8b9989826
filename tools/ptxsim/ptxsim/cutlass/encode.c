// Fills a tensor map in place of the driver, in the emulator's encoding (ptxsim/tensormap.py).
#include <stdint.h>
#include <string.h>

struct Map {
  uint32_t magic;
  uint8_t rank, type, swizzle, fill, interleave, pad[7];
  uint64_t base;
  uint32_t dim[5], pad2;
  uint64_t stride[4];
  uint16_t box[5];
  uint8_t estride[5], rest[33];
};

int cuTensorMapEncodeTiled(void* map, int type, uint32_t rank, void* base, const uint64_t* dim, const uint64_t* stride,
                           const uint32_t* box, const uint32_t* estride, int interleave, int swizzle, int promotion,
                           int fill) {
  // The driver numbers types 8, 9 and 10 in another order than tensormap.replace does.
  static const uint8_t types[] = {0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 8, 11, 12};
  struct Map m;
  memset(&m, 0, sizeof m);
  m.magic = 0x50414d54;
  m.rank = rank;
  m.type = types[type];
  m.swizzle = swizzle;
  m.fill = fill;
  m.interleave = interleave;
  m.base = (uint64_t)base;
  for (uint32_t i = 0; i < rank; i++) {
    m.dim[i] = dim[i];
    m.box[i] = box[i];
    m.estride[i] = estride[i];
    if (i + 1 < rank) m.stride[i] = stride[i];
  }
  memcpy(map, &m, 128);
  return 0;
}
