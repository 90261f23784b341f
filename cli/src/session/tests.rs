use super::*;
use agent::protocol::Size;
use std::io::{PipeReader, PipeWriter, pipe};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};

/// A command that reads what it is told and says what the test wants.
struct Guest(UnixStream);

impl Guest {
    fn hear(&mut self) -> ToGuest {
        ToGuest::parse(Frame::read(&mut self.0).unwrap().unwrap()).unwrap()
    }

    fn says(&mut self, message: FromGuest) {
        self.0.write_all(&message.frame().encode()).unwrap();
    }
}

/// A session in a thread of its own, with both of its ends.
struct Test {
    guest: Guest,
    typed: Option<PipeWriter>,
    shown: PipeReader,
    told: PipeReader,
    session: JoinHandle<Ending>,
}

fn start(keys: Option<&'static str>, has_input: bool) -> Test {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (input, typed) = pipe().unwrap();
    let (shown, output) = pipe().unwrap();
    let (told, errors) = pipe().unwrap();
    let session = thread::spawn(move || {
        let signals = Signals::take().unwrap();
        let keys = keys.map(|keys| keys.parse().unwrap());
        let here = Here {
            input: has_input.then(|| input.as_fd()),
            output: output.as_fd(),
            errors: errors.as_fd(),
            signals: &signals,
            keys: keys.as_ref(),
        };
        run(&ours, &here)
    });
    Test { guest: Guest(theirs), typed: Some(typed), shown, told, session }
}

impl Test {
    /// How it ended, with all that was shown.
    fn end(self) -> (Ending, String, String) {
        let Test { guest, typed, mut shown, mut told, session } = self;
        let ending = session.join().unwrap();
        drop((guest, typed));
        let (mut output, mut errors) = (String::new(), String::new());
        shown.read_to_string(&mut output).unwrap();
        told.read_to_string(&mut errors).unwrap();
        (ending, output, errors)
    }
}

#[test]
fn a_commands_output_is_ours_to_its_end_and_its_code_is_the_ending() {
    let mut test = start(None, true);
    test.guest.says(FromGuest::Stdout(b"one ".into()));
    test.guest.says(FromGuest::Stderr(b"oops".into()));
    test.guest.says(FromGuest::Stdout(b"two".into()));
    test.guest.says(FromGuest::Exit(Ended::Code(3)));
    let (ending, output, errors) = test.end();
    assert!(matches!(ending, Ending::Exit(Ended::Code(3))), "{ending:?}");
    assert_eq!((output.as_str(), errors.as_str()), ("one two", "oops"));
}

#[test]
fn what_is_typed_is_the_commands_input_and_so_is_its_end() {
    let mut test = start(None, true);
    test.typed.as_mut().unwrap().write_all(b"hello \x1d").unwrap();
    assert_eq!(test.guest.hear(), ToGuest::Stdin(b"hello \x1d".into()));
    test.typed = None;
    assert_eq!(test.guest.hear(), ToGuest::StdinEnd);
    test.guest.says(FromGuest::Exit(Ended::Code(0)));
    test.end();
}

#[test]
fn without_input_a_command_is_told_so() {
    let mut test = start(None, false);
    assert_eq!(test.guest.hear(), ToGuest::StdinEnd);
    test.guest.says(FromGuest::Exit(Ended::Signal(9)));
    assert!(matches!(test.end().0, Ending::Exit(Ended::Signal(9))));
}

#[test]
fn a_command_that_does_not_read_makes_us_wait_and_is_heard_meanwhile() {
    let mut test = start(None, true);
    let mut typed = test.typed.take().unwrap();
    let much = thread::spawn(move || {
        // More than all pipes and buffers between hold.
        let written = typed.write_all(&vec![b'x'; 4 << 20]);
        drop(typed);
        written
    });
    test.guest.says(FromGuest::Stdout(b"still here".into()));
    let mut shown = [0; 10];
    test.shown.read_exact(&mut shown).unwrap();
    assert_eq!(&shown, b"still here");
    let mut got = 0;
    loop {
        match test.guest.hear() {
            ToGuest::Stdin(bytes) => got += bytes.len(),
            ToGuest::StdinEnd => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(got, 4 << 20);
    much.join().unwrap().unwrap();
    test.guest.says(FromGuest::Exit(Ended::Code(0)));
    test.end();
}

#[test]
fn the_keys_leave_a_terminal_and_nothing_else_does() {
    let mut test = start(Some("ctrl-p,ctrl-q"), true);
    test.typed.as_mut().unwrap().write_all(b"a\x10b\x1d").unwrap();
    assert_eq!(test.guest.hear(), ToGuest::Stdin(b"a\x10b\x1d".into()));
    test.typed.as_mut().unwrap().write_all(b"\x10").unwrap();
    test.typed.as_mut().unwrap().write_all(b"\x11").unwrap();
    let (ending, ..) = test.end();
    assert!(matches!(ending, Ending::Left), "{ending:?}");
}

#[test]
fn a_connection_that_breaks_is_told_after_what_it_said_before() {
    let mut test = start(None, true);
    test.guest.says(FromGuest::Stdout(b"last".into()));
    test.guest.0.write_all(&[1, 9]).unwrap();
    test.guest.0.shutdown(std::net::Shutdown::Both).unwrap();
    let (ending, output, _) = test.end();
    assert!(matches!(&ending, Ending::Broken(why) if why.contains("ended")), "{ending:?}");
    assert_eq!(output, "last");
}

#[test]
fn what_is_not_of_the_protocol_is_a_broken_connection() {
    for bytes in [[9, 0, 0, 0, 0], [1, 255, 255, 255, 255]] {
        let mut test = start(None, true);
        test.guest.0.write_all(&bytes).unwrap();
        assert!(matches!(test.end().0, Ending::Broken(_)));
    }
}

#[test]
fn output_that_nobody_reads_is_an_ending() {
    let mut test = start(None, true);
    let (end, _) = pipe().unwrap();
    drop(std::mem::replace(&mut test.shown, end));
    test.guest.says(FromGuest::Stdout(b"x".into()));
    let Test { session, guest, typed, .. } = test;
    assert!(matches!(session.join().unwrap(), Ending::Unread));
    drop((guest, typed));
}

/// Signals go to a thread, as they are blocked in it: the session's own.
fn signal(test: &Test, signal: i32) {
    use std::os::unix::thread::JoinHandleExt;
    // SAFETY: the thread has not been joined, so its handle is good, and the session has taken the signal.
    assert_eq!(unsafe { libc::pthread_kill(test.session.as_pthread_t(), signal) }, 0);
}

#[test]
fn signals_go_to_the_command_and_window_changes_only_to_one_with_a_terminal() {
    let mut test = start(Some("none"), true);
    // It has taken signals when it takes input.
    test.typed.as_mut().unwrap().write_all(b"x").unwrap();
    assert_eq!(test.guest.hear(), ToGuest::Stdin(b"x".into()));
    signal(&test, libc::SIGTERM);
    assert_eq!(test.guest.hear(), ToGuest::Signal(libc::SIGTERM));
    signal(&test, libc::SIGWINCH);
    assert!(matches!(test.guest.hear(), ToGuest::Window(Size { .. })));
    test.guest.says(FromGuest::Exit(Ended::Code(0)));
    test.end();

    let mut test = start(None, true);
    test.typed.as_mut().unwrap().write_all(b"x").unwrap();
    assert_eq!(test.guest.hear(), ToGuest::Stdin(b"x".into()));
    signal(&test, libc::SIGWINCH);
    signal(&test, libc::SIGUSR1);
    assert_eq!(test.guest.hear(), ToGuest::Signal(libc::SIGUSR1));
    test.guest.says(FromGuest::Exit(Ended::Code(0)));
    test.end();
}

#[test]
fn a_guest_that_takes_no_signal_is_left_after_a_moment() {
    let mut test = start(None, true);
    let mut typed = test.typed.take().unwrap();
    test.guest.says(FromGuest::Stdout(b"x".into()));
    test.shown.read_exact(&mut [0]).unwrap();
    let written = Arc::<AtomicUsize>::default();
    let counts = written.clone();
    let full = thread::spawn(move || {
        while typed.write_all(&[b'x'; 4096]).is_ok() {
            counts.fetch_add(1, Ordering::SeqCst);
        }
    });
    // Until nothing goes on any more.
    let mut before = 0;
    loop {
        thread::sleep(Duration::from_millis(300));
        let now = written.load(Ordering::SeqCst);
        if now > 0 && now == before {
            break;
        }
        before = now;
    }
    signal(&test, libc::SIGINT);
    let (ending, ..) = test.end();
    assert!(matches!(ending, Ending::Signalled(libc::SIGINT)), "{ending:?}");
    full.join().unwrap();
}

/// A session whose output nobody reads, with as much of it as all pipes between hold.
fn blocked() -> Test {
    let test = start(Some("ctrl-]"), true);
    let mut guest = test.guest.0.try_clone().unwrap();
    guest.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    let frame = FromGuest::Stdout(vec![b'x'; CHUNK]).frame().encode();
    while guest.write_all(&frame).is_ok() {}
    test
}

#[test]
fn the_keys_leave_also_when_nobody_reads_the_output() {
    let mut test = blocked();
    test.typed.as_mut().unwrap().write_all(b"\x1d").unwrap();
    let Test { session, shown, .. } = test;
    assert!(matches!(session.join().unwrap(), Ending::Left));
    drop(shown);
}

#[test]
fn the_second_signal_that_is_to_end_it_ends_it_whatever_the_command_does() {
    for mut test in [blocked(), start(None, true)] {
        test.typed.as_mut().unwrap().write_all(b"x").unwrap();
        assert_eq!(test.guest.hear(), ToGuest::Stdin(b"x".into()));
        signal(&test, libc::SIGINT);
        assert_eq!(test.guest.hear(), ToGuest::Signal(libc::SIGINT));
        signal(&test, libc::SIGUSR1);
        assert_eq!(test.guest.hear(), ToGuest::Signal(libc::SIGUSR1));
        signal(&test, libc::SIGTERM);
        let Test { session, shown, .. } = test;
        let ending = session.join().unwrap();
        assert!(matches!(ending, Ending::Signalled(libc::SIGTERM)), "{ending:?}");
        drop(shown);
    }
}

#[test]
fn the_keys_leave_also_when_the_guest_takes_nothing() {
    let mut test = start(Some("ctrl-]"), true);
    let typed = test.typed.as_mut().unwrap();
    for _ in 0..20 {
        typed.write_all(&[b'x'; CHUNK]).unwrap();
    }
    typed.write_all(b"\x1d").unwrap();
    assert!(matches!(test.end().0, Ending::Left));
}
