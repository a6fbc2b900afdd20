// Python's interpreter lock, for the host. The libraries know no symbol of Python: if the process has an interpreter,
// it is found by name at run time.
#pragma once

#include <dlfcn.h>

namespace torch_adadelta {

// Holds the interpreter's lock, if there is an interpreter.
//
// A tensor that only Python refers to needs the lock when the last reference from C++ goes. The dispatcher has let go
// of it, so each such tensor would take it and leave it again: a quarter of a step of many small tensors.
class HeldGil {
 public:
  HeldGil() : held_(python().is_initialized != nullptr && python().is_initialized() != 0) {
    if (held_) {
      state_ = python().ensure();
    }
  }
  HeldGil(const HeldGil&) = delete;
  HeldGil& operator=(const HeldGil&) = delete;
  ~HeldGil() {
    if (held_) {
      python().release(state_);
    }
  }

 private:
  struct Python {
    int (*is_initialized)();
    int (*ensure)();
    void (*release)(int);
  };

  static const Python& python() {
    static const Python found = [] {
      Python functions{
          reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "Py_IsInitialized")),
          reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "PyGILState_Ensure")),
          reinterpret_cast<void (*)(int)>(dlsym(RTLD_DEFAULT, "PyGILState_Release"))
      };
      if (functions.ensure == nullptr || functions.release == nullptr) {
        functions.is_initialized = nullptr;
      }
      return functions;
    }();
    return found;
  }

  bool held_;
  int state_ = 0;  // a PyGILState_STATE
};

}  // namespace torch_adadelta
