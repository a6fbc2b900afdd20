// Calls every CPU op through PyTorch's dispatcher, without Python, for sanitizers to watch:
//
//     driver LIBRARY
//
// on each instruction set, for tensors of every dtype and several layouts whose memory ends with their last element,
// with each option, by wrong arguments too, and from several threads at a time while another changes the instruction
// set. All runs of a case must give the same bits. PyTorch's loop over its threads is replaced by one over std::thread:
// the sanitizers do not know of what OpenMP's threads wait for.
#include "tensors.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

// ---- PyTorch's threads ----------------------------------------------------------------------------------------------

constexpr int64_t kThreads = 4;

extern "C" AOTITorchError torch_get_num_threads(uint32_t* count) {
  *count = kThreads;
  return AOTI_TORCH_SUCCESS;
}

extern "C" AOTITorchError torch_parallel_for(
    int64_t begin, int64_t end, int64_t grain, ParallelFunc run, void* context
) {
  const int64_t count = end - begin;
  const int64_t pieces = std::min(kThreads, (count + grain - 1) / std::max<int64_t>(grain, 1));
  std::vector<std::thread> threads;
  for (int64_t i = 1; i < pieces; ++i) {
    threads.emplace_back(run, begin + count * i / pieces, begin + count * (i + 1) / pieces, context);
  }
  if (count > 0) {
    run(begin, begin + count / std::max<int64_t>(pieces, 1), context);
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  return AOTI_TORCH_SUCCESS;
}

namespace {

constexpr std::array kOrders{kContiguous, kTransposed, kGaps, kUnaligned};
constexpr std::array kReal{kFloat32, kFloat64, kFloat16, kBFloat16};

struct Lists {
  Tensors params, grads, square_avgs, acc_deltas;
  Tensors averages, remainders;  // or none
  double state_dtype = 0;
  std::vector<std::pair<Tensor, int64_t>> written;  // with the bytes of their memory, from their first element

  Tensor add_written(const Place& place, Dtype dtype, const auto& value) {
    const Tensor tensor = matrix(place, dtype, value);
    const bool is_empty = place.rows * place.columns == 0;
    written.emplace_back(tensor, is_empty ? 0 : (place.length() - place.offset) * item_size(dtype));
    return tensor;
  }

  void add(const Place& place, Dtype dtype, const Place& grad_place, Dtype grad_dtype) {
    const uint64_t seed = params.size();
    const Dtype own_state = state_dtype == 1 ? kFloat32 : state_dtype == 2 ? kBFloat16 : dtype;
    params.push_back(add_written(place, dtype, noise(seed)));
    grads.push_back(matrix(grad_place, grad_dtype, noise(seed + 7777)));
    square_avgs.push_back(add_written(place, own_state, zero));
    acc_deltas.push_back(add_written(place, own_state, zero));
  }

  // Averages, some of which lie in another order than their parameters.
  void add_averages() {
    for (size_t i = 0; i < params.size(); ++i) {
      const Tensor& param = params[i];
      const auto type = param.scalar_type();
      const Dtype dtype = type == torch::headeronly::ScalarType::Double         ? kFloat64
                          : type == torch::headeronly::ScalarType::ComplexFloat ? kComplex64
                                                                                : kFloat32;
      const Place place(param.size(0), param.size(1), kOrders[i / 3 % kOrders.size()]);
      averages.push_back(add_written(place, dtype, noise(i + 5555)));
    }
  }

  // All that an update may have written to.
  std::string bits() const {
    std::string bits;
    for (const auto& [tensor, bytes] : written) {
      if (bytes > 0) {
        bits.append(static_cast<const char*>(tensor.const_data_ptr()), bytes);
      }
    }
    return bits;
  }
};

// Around the blocks of 512 elements in which the kernels convert, and beyond what one thread does alone.
Lists dense_lists(bool with_complex) {
  Lists lists;
  for (const auto& [rows, columns] : {std::pair{1, 1}, {5, 7}, {1, 511}, {16, 32}, {3, 171}, {0, 4}}) {
    for (const Order order : kOrders) {
      for (const Dtype dtype : kReal) {
        lists.add(Place(rows, columns, order), dtype, Place(rows, columns, order), dtype);
        const Order other = kOrders[(order + 1) % kOrders.size()];
        lists.add(Place(rows, columns, order), dtype, Place(rows, columns, other), kReal[(dtype + 1) % kReal.size()]);
      }
      if (with_complex) {
        lists.add(Place(rows, columns, order), kComplex64, Place(rows, columns, kContiguous), kComplex64);
      }
    }
  }
  for (const Order order : kOrders) {
    lists.add(Place(301, 233, order), kReal[order], Place(301, 233, kContiguous), kReal[order]);
  }
  return lists;
}

// Of bfloat16 parameters with masters.
Lists master_lists(double state_dtype) {
  Lists lists;
  lists.state_dtype = state_dtype;
  for (const auto& [rows, columns] : {std::pair{1, 1}, {5, 7}, {3, 171}, {0, 4}, {301, 233}}) {
    for (const Order order : kOrders) {
      const Place place(rows, columns, order);
      lists.add(place, kBFloat16, place, order == kUnaligned ? kFloat32 : kBFloat16);
      lists.remainders.push_back(lists.add_written(place, kInt16, noise(rows)));
    }
  }
  return lists;
}

// ---- The ops --------------------------------------------------------------------------------------------------------

template <typename... Arguments>
StableIValue call(const char* name, const char* overload, const Arguments&... arguments) {
  // Room for a result where there are no arguments.
  std::array<StableIValue, std::max<size_t>(sizeof...(arguments), 1)> stack{torch::stable::detail::from(arguments)...};
  const std::string full = std::string("torch_adadelta::") + name;
  if (torch_call_dispatcher(full.c_str(), overload, stack.data(), TORCH_ABI_VERSION) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error(full + " raised");
  }
  return stack[0];
}

template <typename T>
T result(StableIValue value) {
  return torch::stable::detail::to<T>(value);
}

struct Options {
  const char* name;
  std::optional<double> clipvalue = std::nullopt, clipnorm = std::nullopt;
  double factor = 1;
  OptionalTensor factor_tensor = std::nullopt, grad_scale = std::nullopt, found_inf = std::nullopt, lr = std::nullopt;
  bool in_double = false;
  double loss_scale_factor = 1;
  bool maximize = true;
};

std::vector<Options> all_options() {
  return {
      {.name = "clipvalue", .clipvalue = 0.25},
      {.name = "clipnorm", .clipnorm = 0.5},
      {.name = "clipnorm, scaled", .clipvalue = 0.25, .clipnorm = 0.5, .grad_scale = scalar(3)},
      {.name = "clipnorm, in double", .clipnorm = 0.5, .in_double = true},
      {.name = "factor", .factor = 0.3, .lr = scalar(0.5, kFloat64)},
      {.name = "factor tensor", .factor_tensor = scalar(0.3, kBFloat16), .found_inf = scalar(0)},
      {.name = "factor of the loss", .clipnorm = 0.5, .grad_scale = scalar(3), .loss_scale_factor = 7},
      {.name = "found_inf", .found_inf = scalar(1)},
  };
}

// Segments of an op: the hyperparameters of the first parameters and of the others. Tensors replace numbers.
struct Segments {
  std::vector<int64_t> sizes;
  std::vector<double> hyperparameters;
  std::vector<OptionalTensor> tensors;

  explicit Segments(const Lists& lists, bool maximize = false, OptionalTensor lr = std::nullopt) {
    const auto count = static_cast<int64_t>(lists.params.size());
    sizes = {count / 3, 0, count - count / 3};
    for (size_t i = 0; i < sizes.size(); ++i) {
      hyperparameters.insert(
          hyperparameters.end(),
          {0.75 + 0.125 * i,
           0.9,
           1e-6,
           maximize ? 1.0 : 0.0,
           0.0,
           1.0,
           0.25 * i,
           i == 2 ? 1.0 : 0.0,
           lists.state_dtype,
           lists.remainders.empty() ? 0.0 : 1.0}
      );
    }
    if (lr.has_value()) {
      tensors.resize(hyperparameters.size());
      tensors[tensors.size() / sizes.size() * 2] = lr;
    }
  }
};

void update(const Lists& lists, const Options& options, bool check_only = false) {
  OptionalTensor sums;
  if (options.clipnorm.has_value()) {
    sums = result<Tensor>(call(
        "grad_square_sums",
        "",
        lists.params,
        lists.grads,
        options.clipvalue,
        options.in_double,
        options.grad_scale,
        options.loss_scale_factor
    ));
  }
  const Segments segments(lists, options.maximize, options.lr);
  call(
      "adadelta_",
      "",
      lists.params,
      lists.grads,
      lists.square_avgs,
      lists.acc_deltas,
      lists.averages,
      lists.remainders,
      segments.sizes,
      segments.hyperparameters,
      segments.tensors,
      options.clipvalue,
      options.clipnorm,
      sums,
      options.factor,
      options.factor_tensor,
      options.grad_scale,
      options.loss_scale_factor,
      options.found_inf,
      check_only
  );
}

void update_cached(const Lists& lists, int64_t number) {
  const Segments segments(lists);
  const OptionalTensor none;
  const std::optional<double> no_number;
  call(
      "adadelta_",
      "cached",
      lists.params,
      lists.grads,
      number,
      segments.sizes,
      segments.hyperparameters,
      segments.tensors,
      no_number,
      no_number,
      none,
      1.0,
      none,
      none,
      1.0,
      none,
      false
  );
}

void update_sparse(
    const Lists& lists, const Tensors& indices, const Tensors& values, std::optional<double> clipvalue = std::nullopt
) {
  const Segments segments(lists);
  const OptionalTensor none;
  call(
      "sparse_adadelta_",
      "",
      lists.params,
      indices,
      values,
      lists.square_avgs,
      lists.acc_deltas,
      lists.remainders,
      segments.sizes,
      segments.hyperparameters,
      segments.tensors,
      clipvalue,
      std::optional<double>(),
      none,
      1.0,
      none,
      none,
      1.0,
      none,
      false
  );
}

// ---- Cases: each makes its tensors anew, and returns what became of them --------------------------------------------

std::string plain() {
  const Lists lists = dense_lists(true);
  for (int step = 0; step < 2; ++step) {
    update(lists, {.name = "plain", .maximize = false});
  }
  return lists.bits();
}

// With accumulators that are handed over once.
std::string cached() {
  const Lists lists = dense_lists(true);
  const auto number = result<int64_t>(call("cache_accumulators", "", lists.square_avgs, lists.acc_deltas));
  for (int step = 0; step < 2; ++step) {
    update_cached(lists, number);
  }
  call("drop_accumulators", "", number);
  return lists.bits();
}

// A parameter twice, which must be updated one time after the other.
std::string repeated() {
  Lists lists;
  lists.add(Place(301, 233, kContiguous), kFloat32, Place(301, 233, kTransposed), kFloat16);
  lists.params.push_back(lists.params[0]);
  lists.grads.push_back(lists.grads[0]);
  lists.square_avgs.push_back(lists.square_avgs[0]);
  lists.acc_deltas.push_back(lists.acc_deltas[0]);
  update(lists, {.name = "repeated"});
  return lists.bits();
}

std::string sparse() {
  std::string bits;
  for (const Dtype dtype : kReal) {
    for (const Order order : {kContiguous, kTransposed}) {
      for (const auto& [rows, columns, coo_entries] : {std::array{50, 5001, 130}, {40000, 3, 20001}, {7, 1, 0}}) {
        Lists lists;
        if (dtype == kBFloat16) {
          lists.state_dtype = order == kContiguous ? 1 : 0;
          lists.remainders.push_back(lists.add_written(Place(rows, columns, order), kInt16, noise(6)));
        }
        lists.add(Place(rows, columns, order), dtype, Place(1, 1, kContiguous), dtype);
        const auto random = noise(3);
        const auto row = [&, rows = rows](int64_t k) {
          return static_cast<double>(static_cast<int64_t>((random(k) + 1) / 2 * rows));
        };
        const Tensors indices{matrix(Place(1, coo_entries, kContiguous), kInt64, row)};
        const Dtype value_dtype = order == kContiguous ? dtype : kReal[(dtype + 1) % kReal.size()];
        const Tensors values{matrix(Place(coo_entries, columns, kContiguous), value_dtype, noise(4))};
        update_sparse(lists, indices, values, 0.25);
        bits += lists.bits();
      }
    }
  }
  return bits;
}

template <typename Call>
void check_raises(const std::string& what, const Lists& lists, const Call& wrong) {
  const std::string before = lists.bits();
  try {
    wrong();
  } catch (const std::runtime_error&) {
    check(lists.bits() == before, what + ": something was written");
    return;
  }
  check(false, what + ": no exception");
}

void wrong_arguments() {
  Lists lists;
  lists.add(Place(5, 7, kContiguous), kFloat32, Place(5, 7, kContiguous), kFloat32);
  lists.add(Place(3, 3, kContiguous), kFloat64, Place(3, 3, kContiguous), kFloat64);
  for (Tensors Lists::* part : {&Lists::params, &Lists::grads, &Lists::square_avgs, &Lists::acc_deltas}) {
    Lists shorter = lists;
    (shorter.*part).pop_back();
    check_raises("a list too short", lists, [&] { update(shorter, {.name = ""}); });
    Lists other = lists;
    (other.*part)[1] = matrix(Place(9, 1, kContiguous), kFloat64, zero);
    check_raises("another shape", lists, [&] { update(other, {.name = ""}); });
    (other.*part)[1] = matrix(Place(3, 3, kContiguous), kInt64, zero);
    check_raises("another dtype", lists, [&] { update(other, {.name = ""}); });
    check_raises("lists to check", lists, [&] { update(other, {.name = ""}, true); });
  }
  check_raises("a negative clipvalue", lists, [&] { update(lists, {.name = "", .clipvalue = -1.0}); });
  check_raises("a rate of two elements", lists, [&] {
    update(lists, {.name = "", .lr = matrix(Place(2, 1, kContiguous), kFloat32, zero)});
  });
  check_raises("state of another length", lists, [&] {
    call("cache_accumulators", "", lists.square_avgs, Tensors{lists.acc_deltas[0]});
  });
  check_raises("no such accumulators", lists, [&] { update_cached(lists, -1); });
  for (const double index : {-1.0, 5.0, 1e18}) {
    const Tensors indices{matrix(Place(1, 2, kContiguous), kInt64, [=](int64_t k) { return k == 0 ? 0 : index; })};
    const Tensors values{matrix(Place(2, 7, kContiguous), kFloat32, zero)};
    Lists first;
    first.params = {lists.params[0]};
    first.square_avgs = {lists.square_avgs[0]};
    first.acc_deltas = {lists.acc_deltas[0]};
    check_raises("a row that is not there", lists, [&] { update_sparse(first, indices, values); });
  }
}

std::string averaged() {
  Lists lists = dense_lists(true);
  lists.add_averages();
  update(lists, {.name = "averages"});
  return lists.bits();
}

std::string masters() {
  std::string bits;
  for (const double state_dtype : {0, 1}) {
    Lists lists = master_lists(state_dtype);
    for (int step = 0; step < 2; ++step) {
      update(lists, {.name = "masters", .clipvalue = 0.25});
      if (step == 0) {
        lists.add_averages();
      }
    }
    bits += lists.bits();
  }
  return bits;
}

std::vector<std::string> all_cases() {
  std::vector<std::string> results{plain(), cached(), repeated(), sparse(), averaged(), masters()};
  check(results[0] == results[1], "cached accumulators: other bits");
  for (const Options& options : all_options()) {
    const Lists lists = dense_lists(!options.clipvalue.has_value());
    const std::string before = lists.bits();
    update(lists, options);
    const bool is_skipped = options.name == std::string("found_inf");
    check((lists.bits() == before) == is_skipped, std::string(options.name) + ": written or not");
    results.push_back(lists.bits());
  }
  wrong_arguments();
  return results;
}

int64_t set_capability(int64_t value) { return result<int64_t>(call("set_cpu_capability", "", value)); }

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2 || dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    std::fprintf(stderr, "usage: driver LIBRARY: %s\n", argc == 2 ? dlerror() : "no library");
    return 2;
  }
  try {
    const auto best = result<int64_t>(call("cpu_capability", ""));
    const std::vector<std::string> expected = all_cases();
    for (int64_t capability = 0; capability < best; ++capability) {
      set_capability(capability);
      check(all_cases() == expected, "instruction set " + std::to_string(capability) + ": other bits");
    }
    check_raises("an instruction set that there is not", Lists(), [&] { set_capability(99); });

    std::atomic<int> running{2};
    std::array<std::exception_ptr, 2> errors;
    std::vector<std::thread> threads;
    for (std::exception_ptr& error : errors) {
      threads.emplace_back([&] {
        try {
          check(all_cases() == expected, "two threads at a time: other bits");
        } catch (...) {
          error = std::current_exception();
        }
        --running;
      });
    }
    for (int64_t i = 0; running > 0; ++i) {
      set_capability(i % (best + 1));
      std::this_thread::yield();
    }
    for (std::thread& thread : threads) {
      thread.join();
    }
    for (const std::exception_ptr& error : errors) {
      if (error) {
        std::rethrow_exception(error);
      }
    }
    std::printf("%zu cases, %lld instruction sets: the same bits\n", expected.size(), static_cast<long long>(best + 1));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "driver: %s\n", error.what());
    return 1;
  }
  return 0;
}
