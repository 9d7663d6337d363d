// How Ctrl-C reaches a loop that holds no GIL: the Python module lends a function that looks for signals.
#pragma once

#include <stdexcept>

namespace sst {

// Whether a signal handler has raised; null before the Python module sets it.
inline bool (*interrupt_pending)() = nullptr;

inline void throw_if_interrupted() {
  if (interrupt_pending && interrupt_pending()) throw std::runtime_error("interrupted");
}

}  // namespace sst
