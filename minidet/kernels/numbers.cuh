// What every CUDA file here begins with: REAL is the type in which numbers are stored, Wide the one to compute in.

// The upper half of a float, rounded to the nearest, of two equally near ones to the even.  CUDA's own type needs a
// header, and the compiler that CuPy calls has none where only a driver is installed.
struct Bfloat16 {
    unsigned short bits;

    Bfloat16() = default;
    __device__ Bfloat16(float value)
    {
        unsigned all = __float_as_int(value);
        bits = value != value ? 0x7fc0 : (all + 0x7fff + (all >> 16 & 1)) >> 16;  // rounded up, some NaNs would be 0
    }
    __device__ operator float() const { return __int_as_float((unsigned)bits << 16); }
};

template <class T> struct Widened { typedef T type; };
template <> struct Widened<Bfloat16> { typedef float type; };
typedef Widened<REAL>::type Wide;
