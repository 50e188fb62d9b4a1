# The one list of sources, by folder, and the flags that go with a file's name; included by the package's
# CMakeLists.txt and by csrc/tests.
set(REBASED_CSRC ${CMAKE_CURRENT_LIST_DIR})

# A new compiler's new warning must not break a user's install; .ci/run sets REBASED_WERROR=1.
option(REBASED_WERROR "Warnings are errors" OFF)
set(REBASED_CXX_FLAGS -Wall -Wextra)
if(REBASED_WERROR)
  list(APPEND REBASED_CXX_FLAGS -Werror)
endif()

# rebased_cuda_flags(OUT): nvcc's. Line numbers of kernels, for profilers, quadruple the library and are left out
# unless asked for.
option(REBASED_LINEINFO "Kernels carry line numbers" OFF)
function(rebased_cuda_flags out)
  set(flags -Xcompiler=-Wall,-Wextra)
  if(REBASED_WERROR)
    list(APPEND flags -Werror=all-warnings)
  endif()
  if(REBASED_LINEINFO)
    list(APPEND flags -lineinfo)
  endif()
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
    list(APPEND flags -compress-mode=size)
  endif()
  set(${out} ${flags} PARENT_SCOPE)
endfunction()

# rebased_host_sources(OUT): csrc/cpu, and the launch plan of csrc/cuda, which is plain C++. Files named avx2_* and
# avx512_* are compiled for those instruction sets, and left out where the compiler does not target x86-64.
function(rebased_host_sources out)
  file(GLOB_RECURSE sources CONFIGURE_DEPENDS ${REBASED_CSRC}/cpu/*.cpp ${REBASED_CSRC}/cuda/plan/*.cpp)
  if(NOT CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
    list(FILTER sources EXCLUDE REGEX "/avx(2|512)_[^/]*$")
  endif()
  foreach(source IN LISTS sources)
    # a * b + c may become one fused multiply-add everywhere: vector code is written with operators
    set(options -ffp-contract=fast)
    if(source MATCHES "/portable_[^/]*$" AND CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
      list(APPEND options -Os)  # for processors without AVX2, older than 2013: a small library matters more
    elseif(source MATCHES "/avx2_[^/]*$")
      list(APPEND options -mavx2 -mfma -mf16c)
    elseif(source MATCHES "/avx512_[^/]*$")
      list(APPEND options -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c -mprefer-vector-width=512)
      if(source MATCHES "/avx512_bf16_[^/]*$")
        list(APPEND options -mavx512bf16)
      elseif(source MATCHES "/avx512_amx_[^/]*$")
        list(APPEND options -mavx512bf16 -mamx-tile -mamx-bf16)
      endif()
    endif()
    if(source MATCHES "/cpu/")
      set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "${options}")
    endif()
  endforeach()
  set(${out} ${sources} PARENT_SCOPE)
endfunction()

# rebased_kernel_sources(OUT): the CUDA sources, which the emulator's build compiles as C++.
function(rebased_kernel_sources out)
  file(GLOB sources CONFIGURE_DEPENDS ${REBASED_CSRC}/cuda/launch/*.cu ${REBASED_CSRC}/cuda/instances/*.cu)
  set(${out} ${sources} PARENT_SCOPE)
endfunction()
