#!/usr/bin/env bash
# make sanitize: the native core under AddressSanitizer and UndefinedBehaviorSanitizer, its threads under
# ThreadSanitizer.
# A copy of the package with that core lies in build/sanitize; nothing of it is ever installed.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(command -v "${PYTHON:-python}")
root=$PWD build=$PWD/build/sanitize cxx=${CXX:-g++}
tests=(test_ops.py test_ops_update.py test_ops_adam.py test_ops_masters.py test_ops_arguments.py test_p_norms.py
  test_decay_in_ascent.py test_storage.py test_promises.py
  test_gradient_ownership.py test_faults.py test_properties.py test_cuda_tables.py)

compile() { # folder, sanitizers, target
  cmake -S . -B "$build/$1" -G Ninja -DCMAKE_BUILD_TYPE=Debug -DFUSED_SAM_SANITIZE="$2" -DFUSED_SAM_CUDA=OFF \
    -DPython_EXECUTABLE="$python" -DCMAKE_CXX_COMPILER="$cxx" >"$build.log" || { cat "$build.log"; return 1; }
  cmake --build "$build/$1" --target "$3"
}

mkdir -p "$build"
compile thread thread threads_harness
"$build/thread/threads_harness"

compile address address,undefined _native
rm -rf "$build/package" && mkdir "$build/package"
cp -r fused_sam "$build/package" && rm -f "$build"/package/fused_sam/_native*.so
cp "$build"/address/_native*.so "$build/package/fused_sam"

# libstdc++ too: without it the sanitizer does not find the functions that throw. Python itself leaks on purpose.
LD_PRELOAD=$(for name in asan ubsan stdc++; do "$cxx" -print-file-name="lib$name.so"; done | paste -sd " ")
export LD_PRELOAD PYTHONPATH=$build/package OMP_NUM_THREADS=2
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1
cd "$root/tests"
"$python" -c "import hostile, fused_sam; assert 'sanitize' in fused_sam.__file__; hostile.main()"
# Growth of the process, and what lies beside preloaded libraries of their own, say nothing here.
exec "$python" -m pytest -q -p no:cacheprovider "${tests[@]}" "$@" \
  -k "(native or Native or units) and not thousand and not grow and not swap_takes"
