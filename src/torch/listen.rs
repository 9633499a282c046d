//! Hears what a forward or backward pass does with each parameter, so that values and gradients are exchanged while the pass computes the rest.
#![expect(unsafe_code, reason = "a callback from the C++ shim")]

use std::ffi::{c_int, c_void};
use std::marker::PhantomData;

use anyhow::Result;

use super::sys;

/// What a pass does with a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// A matrix product is about to use its value.
    ValueNeeded,
    /// Something is about to be added to its gradient.
    GradientNeeded,
    /// Its gradient is added; once for each parameter in a backward pass.
    GradientAdded,
}

/// Where a parameter's value or gradient lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spot {
    /// The buffer, as [`super::memory::storage_of`] names it.
    pub storage: usize,
    /// First number, counted from the start of the buffer.
    pub offset: usize,
}

/// Hears a pass. On a GPU the backward pass calls from a thread of libtorch.
pub trait Listener: Sync {
    /// Returns whether the pass may go on.
    fn told(&self, told: Told, spot: Spot) -> bool;
}

/// Runs a pass of this thread with a listener.
///
/// # Errors
/// That of the pass; one that the listener stopped fails as well.
pub fn while_listening<R>(listener: &dyn Listener, pass: impl FnOnce() -> Result<R>) -> Result<R> {
    let _installed = Installed::new(&listener)?;
    pass()
}

/// The shim's listener of this thread, while it points to one of ours.
struct Installed<'a> {
    listener: PhantomData<&'a &'a dyn Listener>,
    /// It must go on the thread that it came on.
    not_send: PhantomData<*const ()>,
}

impl<'a> Installed<'a> {
    fn new(listener: &'a &'a dyn Listener) -> Result<Self> {
        let context: *const &dyn Listener = listener;
        // SAFETY: the guard is dropped, and the shim forgets the pointer with it, before the reference ends.
        sys::checked("listen to a pass", unsafe { sys::cloze_listen(on_told, context.cast_mut().cast()) })?;
        Ok(Self { listener: PhantomData, not_send: PhantomData })
    }
}

impl Drop for Installed<'_> {
    fn drop(&mut self) {
        // SAFETY: no pointers are passed; takes away what `new` put there.
        let _ = unsafe { sys::cloze_listen_no_more() };
    }
}

extern "C" fn on_told(context: *mut c_void, what: c_int, storage: *const c_void, offset: i64) -> c_int {
    // SAFETY: `Installed` keeps the context a live reference while the shim calls; it is only read.
    let listener: &dyn Listener = unsafe { *context.cast_const().cast::<&dyn Listener>() };
    let told = match what {
        0 => Told::ValueNeeded,
        1 => Told::GradientNeeded,
        _ => Told::GradientAdded,
    };
    let may_go_on = listener.told(told, Spot { storage: storage.addr(), offset: offset as usize });
    c_int::from(!may_go_on)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use tch::{Device, Kind, Tensor};

    use super::*;
    use crate::torch::memory::storage_of;
    use crate::torch::ops::{self, Parameter};

    const WIDTH: i64 = 4;

    /// Keeps what it hears, and stops the pass at the first gradient where that is wanted.
    struct Ear {
        heard: Mutex<Vec<(Told, Spot)>>,
        stops: bool,
    }

    impl Listener for Ear {
        fn told(&self, told: Told, spot: Spot) -> bool {
            self.heard.lock().unwrap().push((told, spot));
            !(self.stops && told == Told::GradientNeeded)
        }
    }

    /// Two square layers that lie behind each other in one buffer of values and one of gradients.
    fn pass(values: &Tensor, gradients: &Tensor) -> Result<()> {
        let view = |flat: &Tensor, layer: i64| flat.narrow(0, layer * WIDTH * WIDTH, WIDTH * WIDTH).view([WIDTH, WIDTH]);
        let mut x = Tensor::ones([2, WIDTH], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        for layer in 0..2 {
            x = ops::linear(&x, &Parameter { value: view(values, layer), gradient: Some(view(gradients, layer)) })?;
        }
        x.sum(Kind::Float).f_backward()?;
        Ok(())
    }

    #[test]
    fn every_use_is_heard_in_its_order() {
        let values = Tensor::ones([2 * WIDTH * WIDTH], (Kind::Float, Device::Cpu));
        let gradients = values.zeros_like();
        let ear = Ear { heard: Mutex::default(), stops: false };
        while_listening(&ear, || pass(&values, &gradients)).unwrap();
        pass(&values, &gradients).unwrap();
        let second = (WIDTH * WIDTH) as usize;
        let value = |offset| (Told::ValueNeeded, Spot { storage: storage_of(&values), offset });
        let gradient = |told, offset| (told, Spot { storage: storage_of(&gradients), offset });
        let backward = |offset| [value(offset), gradient(Told::GradientNeeded, offset), gradient(Told::GradientAdded, offset)];
        let expected: Vec<_> = [value(0), value(second)].into_iter().chain(backward(second)).chain(backward(0)).collect();
        assert_eq!(*ear.heard.lock().unwrap(), expected);
    }

    #[test]
    fn a_pass_can_be_stopped() {
        let values = Tensor::ones([2 * WIDTH * WIDTH], (Kind::Float, Device::Cpu));
        let gradients = values.zeros_like();
        let ear = Ear { heard: Mutex::default(), stops: true };
        let error = while_listening(&ear, || pass(&values, &gradients)).unwrap_err();
        assert!(format!("{error:#}").contains("the pass was stopped"), "{error:#}");
        assert_eq!(ear.heard.lock().unwrap().len(), 4);
        assert_eq!(gradients.abs().max().double_value(&[]).to_bits(), 0);
    }
}
