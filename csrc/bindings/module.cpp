// The Python module: loading it registers the ops (csrc/ops); it binds what is not an op.
#include <pybind11/pybind11.h>

#include "kernels/panel.h"
#include "kernels/schedule.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::list sets;
  for (int i = 0; i < sst::kNumInstructionSets; ++i) sets.append(sst::kInstructionSets[i].name);
  py::dict info;
  info["version"] = SST_VERSION;
#ifdef SST_WITH_CUDA
  info["cuda"] = SST_CUDA_VERSION;
  info["cuda_architectures"] = py::str(SST_CUDA_ARCHITECTURES).attr("split")(",");
#else
  info["cuda"] = py::none();
  info["cuda_architectures"] = py::list();
#endif
  info["compiler"] = SST_COMPILER;
  info["torch_target"] = SST_TORCH_TARGET;
  info["instruction_sets"] = sets;
  info["instruction_set_in_use"] = sst::kInstructionSets[sst::instruction_set_in_use()].name;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info);
  m.def("triangle_block", [](int64_t index) {
    const sst::BlockIndex block = sst::triangle_block(index);
    return py::make_tuple(block.row, block.col);
  });
}
