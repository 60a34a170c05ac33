// The emulated library as a Python module: the emulator's options and what tests want of formats.h. The operators are
// in torch.ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../cpu/isa/level.h"
#include "internal.h"
#ifdef PREQUANT_TRACED
#include <algorithm>

#include "tracer/tracer.h"
#endif

namespace prequant {

// build_info lists this library's kernels as those of the CPU, whose tensors they take.
const Kernels& emulated_kernels();
void bind_unchecked(pybind11::module_& m);  // unchecked.cpp
const Kernels& cpu_kernels() { return emulated_kernels(); }
const char* isa_level_name() { return "emulated"; }

}  // namespace prequant

namespace py = pybind11;
using namespace py::literals;
using namespace prequant;

static void set_options(uint64_t seed, const std::string& cp_async, bool poison, int workers, size_t shared_limit) {
    emulator::Options chosen{.seed = seed, .is_poisoned = poison, .workers = workers, .shared_limit = shared_limit};
    if (cp_async == "lazy") {
        chosen.cp_async = emulator::CpAsync::lazy;
    } else if (cp_async == "eager") {
        chosen.cp_async = emulator::CpAsync::eager;
    } else if (cp_async == "random") {
        chosen.cp_async = emulator::CpAsync::random;
    } else {
        throw py::value_error("cp_async must be lazy, eager or random, got " + cp_async);
    }
    emulator::options = chosen;
}

#ifdef PREQUANT_TRACED
namespace tracer = emulator::tracer;

static py::list traffic() {
    static constexpr const char* kKinds[] = {"load", "store", "atomic", "cp_async", "ldmatrix"};
    py::list sites;
    for (const tracer::Traffic& site : tracer::traffic())
        sites.append(py::dict("kernel"_a = tracer::kernel_name(site.kernel),
                              "offset"_a = tracer::library_offset(site.where),
                              "kind"_a = kKinds[static_cast<int>(site.kind)], "is_shared"_a = site.is_shared,
                              "requests"_a = site.requests, "lanes"_a = site.lanes, "bytes"_a = site.bytes,
                              "sectors"_a = site.sectors, "ideal_sectors"_a = site.ideal_sectors,
                              "wavefronts"_a = site.wavefronts, "ideal_wavefronts"_a = site.ideal_wavefronts));
    return sites;
}

static py::list findings() {
    py::list list;
    for (const tracer::Finding& finding : tracer::findings())
        list.append(py::dict("kind"_a = finding.kind, "kernel"_a = finding.kernel, "details"_a = finding.details,
                             "offset"_a = tracer::library_offset(finding.where),
                             "other_offset"_a = tracer::library_offset(finding.other), "count"_a = finding.count));
    return list;
}

static py::list launches() {
    const auto size = [](dim3 n) { return py::make_tuple(n.x, n.y, n.z); };
    py::list list;
    for (const tracer::Launch& launch : tracer::launches())
        list.append(py::dict("kernel"_a = launch.kernel, "grid"_a = size(launch.grid), "block"_a = size(launch.block),
                             "shared_bytes"_a = launch.dynamic_bytes + launch.static_bytes));
    return list;
}

static py::list buffers() {
    py::list list;
    for (const tracer::Buffer& buffer : tracer::buffers())
        list.append(py::dict(
            "name"_a = buffer.name, "bytes"_a = buffer.end - buffer.begin,
            "read_sectors"_a = std::count(buffer.read_sectors.begin(), buffer.read_sectors.end(), true),
            "written_sectors"_a = std::count(buffer.written_sectors.begin(), buffer.written_sectors.end(), true)));
    return list;
}
#endif

PYBIND11_MODULE(PREQUANT_LIBRARY, m) {
    const emulator::Options defaults;
    m.def("options", &set_options, "How kernels run from now on; options() goes back to the defaults.",
          py::arg("seed") = defaults.seed, py::arg("cp_async") = "lazy", py::arg("poison") = defaults.is_poisoned,
          py::arg("workers") = defaults.workers, py::arg("shared_limit") = defaults.shared_limit);

#ifdef PREQUANT_TRACED
    m.def("trace_start", &tracer::start, "Forgets what was traced and listens.");
    m.def("trace_stop", &tracer::stop);
    m.def(
        "trace_buffer",
        [](uintptr_t address, size_t bytes, bool is_writable, const std::string& name) {
            tracer::add_buffer(reinterpret_cast<const void*>(address), bytes, is_writable, true, name);
        },
        "Global memory that kernels may touch. What operators allocate is known already.");
    m.def("trace_traffic", &traffic);
    m.def("trace_findings", &findings);
    m.def("trace_launches", &launches);
    m.def("trace_buffers", &buffers);
#endif

    m.def("container_bits", &container_bits);
    m.def("packed_row_bytes", &packed_row_bytes);
    m.def("word_codes", &word_codes);
    m.def("word_shift", &word_shift);
    m.def("panel_offset", &panel_offset);
    m.def("chunks_along", &chunks_along);
    m.def("lane_bytes", &lane_bytes);
    m.def("chunk_bytes", &chunk_bytes);
    m.def("chunk_lane", &chunk_lane);
    m.def("chunk_code", &chunk_code);
    m.def("chunk_row", &chunk_row);
    m.def("chunk_column", &chunk_column);
    bind_unchecked(m);
}
