// How an op refuses its arguments: by an exception with a prefix that the caller knows. Nothing was written then.
#pragma once

#include <cstddef>
#include <exception>
#include <new>
#include <sstream>
#include <stdexcept>

namespace torch_adadelta {

struct Refusal : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <typename Error = std::runtime_error, typename... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Error(message.str());
}

// Something is wrong with parameter `index` of the lists: `parts` go on about it.
template <typename... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void refuse(size_t index, const Parts&... parts) {
  fail<Refusal>("torch_adadelta refuses parameter ", index, ": ", parts...);
}

// Something is wrong, and no parameter is to blame.
template <typename... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void refuse_call(const Parts&... parts) {
  fail<Refusal>("torch_adadelta refuses the call: ", parts...);
}

inline const Refusal out_of_memory("torch_adadelta refuses the call: out of memory");  // made while there is some

// Calls run(), which writes nothing. Whatever it throws comes out as a Refusal.
template <typename Run>
void before_writing(const Run& run) {
  try {
    run();
  } catch (const Refusal&) {
    throw;
  } catch (const std::bad_alloc&) {
    throw Refusal(out_of_memory);
  } catch (const std::exception& error) {
    refuse_call(error.what());
  } catch (...) {
    refuse_call("an unknown error");
  }
}

}  // namespace torch_adadelta
