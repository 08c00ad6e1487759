// Row kernels of one machine against those of another, without Python.
//
//   row_vectors write FILE            writes what the scalar kernels make of all cases here, and what is right in float64
//   row_vectors check FILE ISA ...    compares what these instruction sets make of the same cases here
//
// `.ci/cpu_checks.py arm` builds it for two architectures and runs both.
#include <cstdlib>
#include <fstream>
#include <stdexcept>

#include "compare.h"
#include "properties.h"

namespace vectors {

// Writes arrays to a file, or reads arrays of the same lengths from it.
class Archive {
 public:
  Archive(const char* path, bool writing)
      : writing_(writing), file_(path, std::ios::binary | (writing ? std::ios::out | std::ios::trunc : std::ios::in)) {
    if (!file_) throw std::runtime_error(std::string("cannot open ") + path);
  }

  template <class T>
  void exchange(std::vector<T>& values) {
    const auto bytes = static_cast<std::streamsize>(values.size() * sizeof(T));
    if (writing_) {
      file_.write(reinterpret_cast<const char*>(values.data()), bytes);
    } else {
      file_.read(reinterpret_cast<char*>(values.data()), bytes);
    }
    if (!file_) throw std::runtime_error(writing_ ? "the file of vectors cannot be written" : "the file of vectors is too short");
  }

  bool at_end() { return file_.peek() == std::ifstream::traits_type::eof(); }

 private:
  bool writing_;
  std::fstream file_;
};

void exchange(Archive& archive, Results& results) {
  Forward& forward = results.forward;
  for (std::vector<float>* values : {&forward.max, &forward.logsum, &forward.logps}) archive.exchange(*values);
  for (std::vector<float>* values : {&results.columns.largest, &results.columns.total}) archive.exchange(*values);
  for (Gradient& gradient : results.gradients) archive.exchange(gradient.buffer);
  archive.exchange(results.taken.out);
}

void exchange(Archive& archive, Oracle& oracle) {
  for (std::vector<double>* values : {&oracle.max, &oracle.logsum, &oracle.logps, &oracle.grad, &oracle.grad_terms, &oracle.rest,
                                      &oracle.mass}) {
    archive.exchange(*values);
  }
}

int write(const char* path) {
  Archive archive(path, true);
  std::uint64_t seed = 0;
  for (const Case& spec : all_cases()) {
    Problem p(spec, ++seed);
    Oracle oracle(p);
    oracle.compute(p);
    Results results(cpo::Isa::kScalar, p, run_forward(cpo::Isa::kScalar, p));
    archive.exchange(p.buffer);
    exchange(archive, oracle);
    exchange(archive, results);
  }
  std::printf("vectors of %zu cases written\n", all_cases().size());
  return EXIT_SUCCESS;
}

int check(const char* path, const std::vector<std::string>& names) {
  bool right = true;
  for (const std::string& name : names) {
    const cpo::Isa isa = cpo::parse_isa(name);
    Archive archive(path, false);
    Verdict verdict;
    check_properties(isa, verdict);
    std::uint64_t seed = 0;
    for (const Case& spec : all_cases()) {
      const Problem p(spec, ++seed);
      std::vector<std::uint8_t> written = p.buffer;
      archive.exchange(written);
      verdict.require(written == p.buffer, spec.name(), "the vectors are of other logits");
      Oracle oracle(p);
      exchange(archive, oracle);
      Results expected(p);
      exchange(archive, expected);
      compare(p, Results(isa, p, expected.forward), expected, oracle, verdict);
    }
    verdict.require(archive.at_end(), "the file of vectors", "more vectors than cases");
    right &= verdict.report(name.c_str());
  }
  return right ? EXIT_SUCCESS : EXIT_FAILURE;
}

}  // namespace vectors

int main(int count, char** arguments) try {
  const std::vector<std::string> words(arguments + 1, arguments + count);
  if (words.size() == 2 && words[0] == "write") return vectors::write(arguments[2]);
  if (words.size() >= 3 && words[0] == "check") return vectors::check(arguments[2], {words.begin() + 2, words.end()});
  std::fprintf(stderr, "usage: row_vectors write FILE | row_vectors check FILE ISA ...\n");
  return EXIT_FAILURE;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return EXIT_FAILURE;
}
