// The Python module: loading it registers the ops (csrc/ops); it binds what is not an op.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <utility>
#include <vector>

#include "kernels/panel.h"
#include "kernels/schedule.h"
#include "solver/interrupt.h"

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

using Product = std::tuple<int64_t, int64_t, int64_t, int64_t>;  // members, d, tokens, tile

// Every unit of a group as (product, member, row, col, first token, end, place in the workspace, splits), in order, and
// the size of the workspace.
py::tuple group_units(const std::vector<Product>& products, int64_t target_units, int64_t least_tokens) {
  std::vector<sst::TriangleSchedule> schedules;
  for (const auto& [members, d, tokens, tile] : products) {
    schedules.push_back({.members = members, .d = d, .tokens = tokens, .tile = tile});
  }
  const int64_t count = static_cast<int64_t>(schedules.size());
  const sst::GroupTotals totals = sst::schedule_group(schedules.data(), count, target_units, least_tokens);
  py::list units;
  for (int64_t index = 0; index < totals.units; ++index) {
    const int64_t i = sst::find_schedule(schedules.data(), count, &sst::TriangleSchedule::first_unit, index);
    const sst::TriangleSchedule& part = schedules[i];
    const auto unit = part.unit(index - part.first_unit);
    const int64_t place = part.partial(unit.member, unit.tile, unit.split);
    units.append(py::make_tuple(i, unit.member, unit.tile.row, unit.tile.col, unit.tokens.begin, unit.tokens.end, place,
                                part.splits));
  }
  return py::make_tuple(units, totals.workspace);
}

// Whether a signal handler has raised, looked for on behalf of code that does not hold the GIL. What it raised is kept
// for take_interrupt: an exception of Python does not survive the way through torch's dispatcher.
py::object& interrupt() {
  static auto* const kept = new py::object(py::none());
  return *kept;
}
bool interrupt_pending() {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() == 0) return false;
  interrupt() = py::error_already_set().value();
  return true;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info);
  m.def("triangle_block", [](int64_t index) {
    const sst::BlockIndex block = sst::triangle_block(index);
    return py::make_tuple(block.row, block.col);
  });
  sst::interrupt_pending = &interrupt_pending;
  m.def("take_interrupt", [] { return std::exchange(interrupt(), py::none()); });
  m.def("group_units", &group_units);
}
