# Build configuration of GPAW, named by the environment variable GPAW_CONFIG while pip compiles it. GPAW executes
# this file inside its own set-up script, so it is never imported by CrystalJAX.
#
# Why it exists: left alone, GPAW 26.7 calls `gcc` to compile C++ (and fails with "c/bmgs/zero.c: fatal error:
# algorithm: No such file or directory" where no C++ compiler is installed), and it calls `mpicc` wherever that
# exists, even without MPI's headers. One calculation here is one process on one core, so the serial build, which
# needs nothing but a C compiler, BLAS and libxc, is all that is wanted.
compiler = "cc"
mpi = False
