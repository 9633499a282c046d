//! NCCL's functions and types, and the one place where a communicator is touched.
#![expect(unsafe_code, reason = "calls NCCL")]

use std::borrow::Cow;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ops::Range;
use std::ptr;
use std::sync::OnceLock;

use cudarc::nccl::sys as nccl;

use super::device::Stream;
use super::functions::{DriverFunctions, NcclFunctions};
use crate::collective::api::CollectiveCause;

/// The driver's library, in the order in which names are tried.
const DRIVER_NAMES: [&str; 2] = ["libcuda.so.1", "libcuda.so"];
/// NCCL's library. The first name is that of the one which libtorch has loaded; a copy of another version beside it would be asking for trouble.
const NCCL_NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
/// What makes NCCL accept a configuration, as its header defines it.
const CONFIG_MAGIC: c_uint = 0xcafe_beef;
/// The version whose configuration is spoken, 2.28.9: the one that libtorch 2.11 comes with. Later ones accept it.
const CONFIG_VERSION: c_uint = 22_809;
/// NCCL's mark for a setting that is left to it.
const UNDEFINED: c_int = c_int::MIN;
/// Size of what the ranks of a new communicator find each other by.
pub const UNIQUE_ID_BYTES: usize = 128;
const BYTES_PER_ELEMENT: u64 = 4;

/// What NCCL says to a call.
pub type Status = nccl::ncclResult_t;

/// A communicator, or none before it begins and after it is taken.
pub struct Communicator {
    libraries: &'static Libraries,
    /// Null where there is none.
    handle: nccl::ncclComm_t,
}

// SAFETY: NCCL lets any thread use a communicator, one at a time; every use but the last needs the exclusive access that the group's lock gives.
unsafe impl Send for Communicator {}

impl Communicator {
    /// None yet.
    pub fn new(libraries: &'static Libraries) -> Self {
        Self { libraries, handle: ptr::null_mut() }
    }

    /// Begins to form it on the thread's current device; `is_in_progress` tells when that is done.
    pub fn begin(&mut self, rank: usize, world_size: usize, id: [u8; UNIQUE_ID_BYTES]) -> Result<(), CollectiveCause> {
        let id = nccl::ncclUniqueId { internal: id.map(|byte| byte as c_char) };
        let mut config = config();
        let (handle, config) = (&raw mut self.handle, &raw mut config);
        // SAFETY: the pointers are to living values of the types that NCCL names.
        let status = unsafe { (self.libraries.nccl.ncclCommInitRankConfig)(handle, world_size as c_int, id, rank as c_int, config) };
        self.libraries.accepted(status, self.handle)
    }

    /// Asks NCCL for an operation on the values at `address`, on a stream of the thread's current device.
    pub fn issue(&mut self, address: u64, stream: Stream, issue: impl Fn(&Call) -> Status) -> Result<(), CollectiveCause> {
        if self.handle.is_null() {
            return Err(CollectiveCause::Closed);
        }
        let call = Call { library: &self.libraries.nccl, communicator: self.handle, stream: stream.0.cast(), address };
        self.libraries.accepted(issue(&call), self.handle)
    }

    /// Whether NCCL still works on what it was asked for; fails with what went wrong in the background, and as closed where there is none.
    pub fn is_in_progress(&mut self) -> Result<bool, CollectiveCause> {
        if self.handle.is_null() {
            return Err(CollectiveCause::Closed);
        }
        let mut state = Status::ncclSuccess;
        // SAFETY: the handle is not null, so it lives.
        let status = unsafe { (self.libraries.nccl.ncclCommGetAsyncError)(self.handle, &raw mut state) };
        self.libraries.accepted(status, self.handle)?;
        self.libraries.accepted(state, self.handle)?;
        Ok(state == Status::ncclInProgress)
    }

    /// Leaves none behind.
    pub fn take(&mut self) -> Self {
        std::mem::replace(self, Self::new(self.libraries))
    }

    /// Ends it and what it is doing. NCCL may need long for that.
    pub fn abort(self) -> Result<(), CollectiveCause> {
        if self.handle.is_null() {
            return Ok(());
        }
        // SAFETY: nobody else has the handle, and it is ended once.
        let status = unsafe { (self.libraries.nccl.ncclCommAbort)(self.handle) };
        self.libraries.accepted(status, ptr::null_mut())
    }
}

/// One call of NCCL: all operations work in place, on values that start at `address`.
pub struct Call<'a> {
    library: &'a NcclFunctions,
    communicator: nccl::ncclComm_t,
    stream: nccl::cudaStream_t,
    address: u64,
}

impl Call<'_> {
    const FLOAT: nccl::ncclDataType_t = nccl::ncclDataType_t::ncclFloat32;
    const SUM: nccl::ncclRedOp_t = nccl::ncclRedOp_t::ncclSum;

    fn at(&self, element: usize) -> *mut c_void {
        ptr::with_exposed_provenance_mut((self.address + element as u64 * BYTES_PER_ELEMENT) as usize)
    }

    /// The sum of all values, for everybody.
    pub fn all_reduce(&self, len: usize) -> Status {
        let data = self.at(0);
        // SAFETY: whoever made the `DeviceFloats` promises the memory; communicator and stream live while the call is made.
        unsafe { (self.library.ncclAllReduce)(data, data, len, Self::FLOAT, Self::SUM, self.communicator, self.stream) }
    }

    /// The sum of each share for its rank; all are of one size, and `share` is this rank's.
    pub fn reduce_scatter(&self, share: Range<usize>) -> Status {
        let (data, place) = (self.at(0), self.at(share.start));
        // SAFETY: as for `all_reduce`; the share lies inside the values.
        unsafe { (self.library.ncclReduceScatter)(data, place, share.len(), Self::FLOAT, Self::SUM, self.communicator, self.stream) }
    }

    /// Every share for everybody; all are of one size, and `share` is this rank's.
    pub fn all_gather(&self, share: Range<usize>) -> Status {
        let (data, place) = (self.at(0), self.at(share.start));
        // SAFETY: as for `reduce_scatter`.
        unsafe { (self.library.ncclAllGather)(place, data, share.len(), Self::FLOAT, self.communicator, self.stream) }
    }

    /// The sum of one share, for the rank `root`.
    pub fn reduce(&self, share: Range<usize>, root: c_int) -> Status {
        let place = self.at(share.start);
        // SAFETY: as for `reduce_scatter`.
        unsafe { (self.library.ncclReduce)(place, place, share.len(), Self::FLOAT, Self::SUM, root, self.communicator, self.stream) }
    }

    /// The share of the rank `root`, for everybody.
    pub fn broadcast(&self, share: Range<usize>, root: c_int) -> Status {
        let place = self.at(share.start);
        // SAFETY: as for `reduce_scatter`.
        unsafe { (self.library.ncclBroadcast)(place, place, share.len(), Self::FLOAT, root, self.communicator, self.stream) }
    }

    /// A share for one rank, and the share of another one; both go at the same time.
    pub fn pass_on(&self, (own, to): (Range<usize>, c_int), (other, from): (Range<usize>, c_int)) -> Status {
        let (sent, received) = (self.at(own.start), self.at(other.start));
        // SAFETY: as for `in_one`; both shares lie inside the values.
        let mut first = unsafe { (self.library.ncclGroupStart)() };
        // Each rank knows the other one's length, so that an empty share is waited for by nobody.
        if !own.is_empty() {
            // SAFETY: as for `reduce_scatter`.
            let status = unsafe { (self.library.ncclSend)(sent, own.len(), Self::FLOAT, to, self.communicator, self.stream) };
            first = first_error(first, status);
        }
        if !other.is_empty() {
            // SAFETY: as for `reduce_scatter`.
            let status = unsafe { (self.library.ncclRecv)(received, other.len(), Self::FLOAT, from, self.communicator, self.stream) };
            first = first_error(first, status);
        }
        // SAFETY: as above.
        first_error(first, unsafe { (self.library.ncclGroupEnd)() })
    }

    /// One call for each rank's share, which NCCL runs together; the first error of them.
    pub fn in_one(&self, shares: impl Iterator<Item = Range<usize>>, each: impl Fn(&Self, Range<usize>, c_int) -> Status) -> Status {
        // SAFETY: a group is opened and closed on the same thread, and nothing in between returns early.
        let mut first = unsafe { (self.library.ncclGroupStart)() };
        for (root, share) in shares.enumerate().filter(|(_, share)| !share.is_empty()) {
            first = first_error(first, each(self, share, root as c_int));
        }
        // SAFETY: as above.
        first_error(first, unsafe { (self.library.ncclGroupEnd)() })
    }
}

fn first_error(first: Status, second: Status) -> Status {
    if matches!(first, Status::ncclSuccess | Status::ncclInProgress) { second } else { first }
}

/// NCCL's settings: do not block, and everything else as NCCL likes.
fn config() -> nccl::ncclConfig_t {
    nccl::ncclConfig_t {
        size: size_of::<nccl::ncclConfig_t>(),
        magic: CONFIG_MAGIC,
        version: CONFIG_VERSION,
        blocking: 0,
        cgaClusterSize: UNDEFINED,
        minCTAs: UNDEFINED,
        maxCTAs: UNDEFINED,
        netName: ptr::null(),
        splitShare: UNDEFINED,
        trafficClass: UNDEFINED,
        commName: ptr::null(),
        collnetEnable: UNDEFINED,
        CTAPolicy: UNDEFINED,
        shrinkShare: UNDEFINED,
        nvlsCTAs: UNDEFINED,
        nChannelsPerNetPeer: UNDEFINED,
        nvlinkCentricSched: UNDEFINED,
    }
}

/// The identifier by which the ranks of a new communicator find each other.
pub fn unique_id(libraries: &Libraries) -> Result<[u8; UNIQUE_ID_BYTES], CollectiveCause> {
    let mut id = nccl::ncclUniqueId { internal: [0; UNIQUE_ID_BYTES] };
    // SAFETY: the pointer is to a living identifier.
    let result = unsafe { (libraries.nccl.ncclGetUniqueId)(&raw mut id) };
    libraries.accepted(result, ptr::null_mut())?;
    Ok(id.internal.map(|byte| byte as u8))
}

/// The two libraries, opened when the first group of a process needs them.
pub struct Libraries {
    /// NCCL.
    nccl: NcclFunctions,
    /// The CUDA driver.
    pub cuda: DriverFunctions,
}

/// Opens both libraries once; the outcome stays.
pub fn libraries() -> Result<&'static Libraries, CollectiveCause> {
    static LIBRARIES: OnceLock<Result<Libraries, String>> = OnceLock::new();
    let outcome = LIBRARIES.get_or_init(|| {
        let cuda = opened(&DRIVER_NAMES, DriverFunctions::open)?;
        let nccl = opened(&NCCL_NAMES, NcclFunctions::open)?;
        Ok(Libraries { nccl, cuda })
    });
    outcome.as_ref().map_err(|text| CollectiveCause::Unavailable(text.clone()))
}

/// The first library that opens; the error is that of the first name, which is the usual one.
fn opened<L, E: Into<anyhow::Error>>(names: &[&str], open: impl Fn(&str) -> Result<L, E>) -> Result<L, String> {
    let mut text = String::new();
    for name in names {
        match open(name) {
            Ok(library) => return Ok(library),
            Err(error) if text.is_empty() => text = format!("{name} cannot be used: {:#}", error.into()),
            Err(_) => {}
        }
    }
    Err(text)
}

impl Libraries {
    /// Turns a result of NCCL into an error, with NCCL's own words. An operation that is still in progress is none.
    fn accepted(&self, status: Status, communicator: nccl::ncclComm_t) -> Result<(), CollectiveCause> {
        if matches!(status, Status::ncclSuccess | Status::ncclInProgress) {
            return Ok(());
        }
        // SAFETY: both return a text that NCCL keeps; the second takes a living communicator or null.
        let texts = unsafe { [(self.nccl.ncclGetErrorString)(status), (self.nccl.ncclGetLastError)(communicator)] };
        // SAFETY: a text of NCCL ends with a NUL byte.
        let texts = texts.map(|text| if text.is_null() { Cow::Borrowed("") } else { unsafe { CStr::from_ptr(text) }.to_string_lossy() });
        let text = format!("NCCL failed: {}; {}", texts[0], texts[1].lines().next().unwrap_or_default());
        Err(match status {
            Status::ncclUnhandledCudaError => CollectiveCause::Device(text),
            // The arguments are those of this program: what is wrong with them is where it runs, such as two ranks on one GPU.
            Status::ncclInvalidArgument | Status::ncclInvalidUsage => CollectiveCause::Unavailable(text),
            _ => CollectiveCause::Library(text),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_library_that_opens_is_taken() {
        let missing = opened(&["first.so", "second.so"], |name| Err::<(), _>(anyhow::anyhow!("no {name}")));
        assert_eq!(missing, Err("first.so cannot be used: no first.so".to_owned()));
        let second = opened(&["first.so", "second.so"], |name| if name == "second.so" { Ok(2) } else { Err(anyhow::anyhow!("not there")) });
        assert_eq!(second, Ok(2));
        // A library that is there and is not NCCL says which function it lacks.
        let other = opened(&["libc.so.6"], NcclFunctions::open).err();
        assert!(other.is_some_and(|text| text.contains("libc.so.6") && text.contains("ncclAllGather")));
    }

    #[test]
    fn the_first_error_of_several_calls_counts() {
        let (fine, under_way) = (Status::ncclSuccess, Status::ncclInProgress);
        let (first, second) = (Status::ncclSystemError, Status::ncclRemoteError);
        assert_eq!(first_error(fine, under_way), under_way);
        assert_eq!(first_error(under_way, second), second);
        assert_eq!(first_error(first, second), first);
        assert_eq!(first_error(first, fine), first);
    }
}
