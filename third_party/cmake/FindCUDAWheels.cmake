# A CUDA toolkit from the PyPI wheels of third_party/cuda-requirements.txt, if they are installed.
#
# The wheels put libraries into lib/ where nvcc looks in lib64/, and ship no unversioned .so names;
# nvcc also resolves its own path through a linked directory. So an overlay of per-file links is
# made in the build tree. Sets CMAKE_CUDA_COMPILER and CUDAToolkit_ROOT.

find_package(Python3 COMPONENTS Interpreter REQUIRED)
execute_process(
  COMMAND ${Python3_EXECUTABLE} -c [=[
import pathlib, sys
roots = [r for p in sys.path for r in sorted(pathlib.Path(p or ".").glob("nvidia/cu[0-9]*"), reverse=True)]
print(next((r for r in roots if (r / "bin/nvcc").exists()), ""), end="")]=]
  OUTPUT_VARIABLE wheels)

if(wheels)
  set(overlay ${CMAKE_BINARY_DIR}/cuda)
  file(MAKE_DIRECTORY ${overlay}/bin ${overlay}/lib)
  foreach(directory bin lib)
    file(GLOB files ${wheels}/${directory}/*)
    foreach(file ${files})
      get_filename_component(name ${file} NAME)
      file(CREATE_LINK ${file} ${overlay}/${directory}/${name} SYMBOLIC)
      if(name MATCHES "^(lib[a-zA-Z_-]+\\.so)\\.[0-9]+$")
        file(CREATE_LINK ${file} ${overlay}/${directory}/${CMAKE_MATCH_1} SYMBOLIC)
      endif()
    endforeach()
  endforeach()
  file(CREATE_LINK ${overlay}/lib ${overlay}/lib64 SYMBOLIC)
  foreach(directory include nvvm)
    if(EXISTS ${wheels}/${directory})
      file(CREATE_LINK ${wheels}/${directory} ${overlay}/${directory} SYMBOLIC)
    endif()
  endforeach()
  set(CMAKE_CUDA_COMPILER ${overlay}/bin/nvcc)
  set(CUDAToolkit_ROOT ${overlay})
  list(PREPEND CMAKE_PREFIX_PATH ${overlay})
endif()
