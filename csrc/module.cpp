// `import weightxform._C` loads the CPU kernels, which register themselves; the module only says how it was built.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#ifndef WEIGHTXFORM_BUILD
#define WEIGHTXFORM_BUILD "unknown"
#endif

static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C() {  // the macro also makes it visible: everything else is hidden
  PyObject* m = PyModule_Create(&module);
  if (m != nullptr && PyModule_AddStringConstant(m, "build", WEIGHTXFORM_BUILD) != 0) {
    Py_DECREF(m);
    return nullptr;
  }
  return m;
}
